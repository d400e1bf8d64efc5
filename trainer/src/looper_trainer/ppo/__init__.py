"""PPO with a reward over HTTP. `loop.py` reads top to bottom; the other modules are the parts it names."""
