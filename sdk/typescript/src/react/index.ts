export { Markdown, Piece, PlainCode, useAnnouncement, type CodeProps, type MarkdownProps } from "./markdown.js";
export { uiMessages, useBehestChat, type BehestChat, type ChatStatus, type UiMessage, type UseBehestChatOptions } from "./useBehestChat.js";
export { useBehestThreads, type BehestThreads } from "./useBehestThreads.js";
