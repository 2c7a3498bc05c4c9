// The CPU ops in C++. Plain C ABI: no Python or torch headers, so one library serves every Python and torch version.
// Tensors arrive as pointers; shapes are in the comments. Memory that an op needs comes from the caller too: nothing here
// allocates, so nothing fails in a way that Python cannot be told of.
// Letters: B sequences, N packed tokens, R rows, V vocabulary, H hidden.

extern "C" int fastppo_abi_version() { return 10; }
