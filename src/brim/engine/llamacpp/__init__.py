"""llama.cpp through llama-cpp-python's low-level functions; engine.py is the way in."""
