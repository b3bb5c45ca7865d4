// As much as metal-cpp takes from it.

#pragma once

#include <stdint.h>

typedef double CFTimeInterval;
