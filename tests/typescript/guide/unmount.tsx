useEffect(() => {
  return () => abortRef.current?.abort(); // cancel in-flight request on nav
}, []);
