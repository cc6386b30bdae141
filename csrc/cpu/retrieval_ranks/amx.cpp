// Retrieval ranks for AMX.
#if defined(__x86_64__)
#define SVITT_ISA amx
#include "pairs.h"
#endif
