#pragma once

typedef struct CGSize {
  double width;
  double height;
} CGSize;
