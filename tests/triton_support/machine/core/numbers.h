// Conversions and comparisons: round to nearest even, canonical NaN.
#pragma once
#include "state.h"
static inline float bf2f(u32 x) {
  u32 y = x << 16;
  float f;
  memcpy(&f, &y, 4);
  return f;
}
static inline u32 f2bf(float f) {
  u32 x;
  memcpy(&x, &f, 4);
  if (f != f) return 0x7fff;
  return (x + 0x7fff + ((x >> 16) & 1)) >> 16;
}
static inline float h2f(u32 x) {
  _Float16 h;
  u16 y = (u16)x;
  memcpy(&h, &y, 2);
  return (float)h;
}
static inline u32 f2h(float f) {
  if (f != f) return 0x7fff;
  _Float16 h = (_Float16)f;
  u16 y;
  memcpy(&y, &h, 2);
  return y;
}
static inline float tf(u32 x) {
  x &= 0xffffe000u;
  float f;
  memcpy(&f, &x, 4);
  return f;
}
template <class T>
static inline u32 cmpi(T a, T b, int c) {
  switch (c) {
    case 0: return a == b;
    case 1: return a != b;
    case 2: return a < b;
    case 3: return a <= b;
    case 4: return a > b;
    case 5: return a >= b;
  }
  return 0;
}
template <class T>
static inline u32 cmpf(T a, T b, int c) {
  bool n = (a != a) || (b != b);
  switch (c) {
    case 0: return !n && a == b;
    case 1: return !n && a != b;
    case 2: return !n && a < b;
    case 3: return !n && a <= b;
    case 4: return !n && a > b;
    case 5: return !n && a >= b;
    case 6: return n || a == b;
    case 7: return n || a != b;
    case 8: return n || a < b;
    case 9: return n || a <= b;
    case 10: return n || a > b;
    case 11: return n || a >= b;
    case 12: return !n;
    case 13: return n;
  }
  return 0;
}
static inline float hop(int k, float a, float b) {
  switch (k) {
    case 0: return a + b;
    case 1: return a - b;
    case 2: return a * b;
    case 3: return fminf(a, b);
    case 4: return fmaxf(a, b);
  }
  return NAN;
}
