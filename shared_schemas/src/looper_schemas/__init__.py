"""Public names shared by every part of Looper; see the modules for what each one promises."""
