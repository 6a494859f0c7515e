// One operation of all active lanes: S a statement of lane i, E an expression of a, b, c.
#pragma once
#define LOOP(S)                                                \
  do {                                                         \
    if (m == 0xffffffffu) {                                    \
      _Pragma("GCC ivdep") for (int i = 0; i < 32; i++) { S; } \
    } else {                                                   \
      for (int i = 0; i < 32; i++)                             \
        if (m >> i & 1) { S; }                                 \
    }                                                          \
  } while (0)
#define E1(NAME, TD, TA, EX)         \
  case NAME: {                       \
    TD* d = R<TD>(r, o[0]);          \
    TA* pa = R<TA>(r, o[1]);         \
    LOOP(TA a = pa[i]; d[i] = (EX)); \
  } break;
#define E2(NAME, TD, TA, TB, EX)                   \
  case NAME: {                                     \
    TD* d = R<TD>(r, o[0]);                        \
    TA* pa = R<TA>(r, o[1]);                       \
    TB* pb = R<TB>(r, o[2]);                       \
    LOOP(TA a = pa[i]; TB b = pb[i]; d[i] = (EX)); \
  } break;
#define E3(NAME, TD, TA, TB, TC, EX)                             \
  case NAME: {                                                   \
    TD* d = R<TD>(r, o[0]);                                      \
    TA* pa = R<TA>(r, o[1]);                                     \
    TB* pb = R<TB>(r, o[2]);                                     \
    TC* pc = R<TC>(r, o[3]);                                     \
    LOOP(TA a = pa[i]; TB b = pb[i]; TC c = pc[i]; d[i] = (EX)); \
  } break;
#define SETP(NAME, T, GET, FN)          \
  case NAME: {                          \
    T* pa = R<T>(r, o[1]);              \
    T* pb = R<T>(r, o[2]);              \
    u32 v = 0;                          \
    for (int i = 0; i < 32; i++) {      \
      auto a = GET(pa[i]);              \
      auto b = GET(pb[i]);              \
      v |= FN(a, b, in.aux) << i;       \
    }                                   \
    if (in.aux2) {                      \
      u32 c = r[o[3]];                  \
      if (in.aux2 == 1)                 \
        v &= c;                         \
      else if (in.aux2 == 2)            \
        v |= c;                         \
      else                              \
        v ^= c;                         \
    }                                   \
    r[o[0]] = (r[o[0]] & ~m) | (v & m); \
  } break;
#define ID(x) (x)
#define S16(x) ((s32)(s16)(x))
#define U16(x) ((u32)((x) & 0xffff))
