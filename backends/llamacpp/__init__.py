"""llama.cpp in this process: GGUF files at its own speed, behind the driver that ours share."""
