"""Chats: messages, templates, and which of the text is learned."""
