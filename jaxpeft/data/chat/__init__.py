"""Chats: messages, chat templates, and the loss mask."""
