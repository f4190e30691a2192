import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "react";

/** Keeps the end of a growing text in view, until the reader scrolls away from it. */
export function useFollow(changes: unknown): {
  scroller: React.RefObject<HTMLDivElement | null>;
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
  useLayoutEffect(() => {
    if (following.current && scroller.current) scroller.current.scrollTop = scroller.current.scrollHeight;
  }, [changes]);
  return useMemo(() => ({ scroller, atEnd, toEnd }), [atEnd, toEnd]);
}
