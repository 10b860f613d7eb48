"""The target in SGLang, unpatched, inside our own process. The only folder that imports sglang."""
