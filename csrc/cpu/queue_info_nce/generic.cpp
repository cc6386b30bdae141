// InfoNCE against a batch and a queue for any processor.
#define SVITT_ISA generic
#include "kernels.h"
