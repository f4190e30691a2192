import { useCallback, useEffect, useMemo, useRef, useState } from "react";

/** Keeps the end of a growing text in view, until the reader scrolls away from it. */
export function useFollow(): {
  scroller: React.RefObject<HTMLDivElement | null>;
  /** What grows inside of the scroller. */
  content: React.RefCallback<HTMLElement>;
  atEnd: boolean;
  toEnd: () => void;
} {
  const scroller = useRef<HTMLDivElement>(null);
  const following = useRef(true);
  const [atEnd, setAtEnd] = useState(true);
  const toEnd = useCallback(() => {
    following.current = true;
    setAtEnd(true);
    scroller.current?.scrollTo({ top: scroller.current.scrollHeight });
  }, []);
  useEffect(() => {
    const element = scroller.current;
    if (!element) return undefined;
    let lastTop = element.scrollTop;
    const look = (): void => {
      const near = element.scrollHeight - element.scrollTop - element.clientHeight < 48;
      // Only a movement upwards is the reader's: content that grows moves nothing.
      if (near) following.current = true;
      else if (element.scrollTop < lastTop - 2) following.current = false;
      lastTop = element.scrollTop;
      setAtEnd(following.current);
    };
    element.addEventListener("scroll", look, { passive: true });
    return () => element.removeEventListener("scroll", look);
  }, []);
  // The browser tells of a new height when it has laid out the frame anyway, and before it is painted. Asking for the
  // height after each change would make it lay out the page once more.
  const content = useCallback((element: HTMLElement | null) => {
    if (!element) return undefined;
    const observer = new ResizeObserver(() => {
      if (following.current && scroller.current) scroller.current.scrollTop = scroller.current.scrollHeight;
    });
    observer.observe(element);
    if (scroller.current) observer.observe(scroller.current);
    return () => observer.disconnect();
  }, []);
  return useMemo(() => ({ scroller, content, atEnd, toEnd }), [content, atEnd, toEnd]);
}
