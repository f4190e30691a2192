const [raw, setRaw] = useState("");
const rendered = useMemo(() => markdownToHtml(raw), [raw]);

// In the loop:
setRaw((r) => r + delta);
