"""The commands: they parse, call and print. No module of this room imports torch before a command needs it."""
