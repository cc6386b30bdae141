// The sigmoid loss for any processor.
#define SVITT_ISA generic
#include "kernels.h"
