#pragma once

#include <stdint.h>

typedef double CFTimeInterval;
