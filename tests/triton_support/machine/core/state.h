// The state of a launch: decoded code, memory with its shadows, warps.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>
#include "opcodes.h"
typedef uint32_t u32;
typedef int32_t s32;
typedef uint64_t u64;
typedef int64_t s64;
typedef uint16_t u16;
typedef int16_t s16;
typedef uint8_t u8;
struct Ins {
  s32 op, pred, pneg, ext, n, aux, aux2, line;
  s64 imm;
};
struct Sh {
  u32 wep, rep, wcta, rcta, rm, wl, rl;
  u8 ww, init, pend;
  u8 fence;
};
struct Alloc {
  u8* host;
  u64 size;
  Sh* sh;
};
struct Cp {
  u32 lane;
  u32 dst;
  u64 src;
  u32 size, n;
};
struct Wg {
  const Ins* in;
  u32 regsA[32 * 4];
  u64 da, db;
  bool scaleD;
};
struct Frag {
  s32 pc;
  u32 mask;
};
struct Warp {
  u32* r;
  std::vector<Frag> f;
  bool done, atbar;
  s32 barpc;
  int id;
  std::vector<Cp> open;
  std::vector<std::vector<Cp>> groups;
  std::vector<Wg> wopen;
  std::vector<std::vector<Wg>> wgroups;
  u32 fences;
};
struct Stats {
  u64 instr, mma, races_s, races_g, races_cta, benign_ww, uninit_s, nc, pend, misal, bars, proxy,
      divergent, poisoned, benign_g, proxy_cp, uninit_g;
};
struct Emu {
  const Ins* code;
  int ncode;
  const s32* pool;
  const u32* tmpl;
  int words;
  int nwarps;
  std::vector<Alloc> al;
  std::vector<u8> sm;
  std::vector<Sh> ssh;
  const u8* params;
  Stats st;
  std::string err;
  std::string log;
  int nlog;
  u32 epoch;
  u32 cta;
  u32 cta0;
  bool lazy;
  bool poison;
  u64 maxinstr;
  u32 ctaid[3];
  Warp* cw;
  const Ins* ci;
  int lane;
  u64* counts;
  void fault(const char* what, u64 addr = 0) {
    if (err.empty()) {
      char b[400];
      snprintf(b, 400, "%s: line %d cta %u,%u,%u warp %d lane %d address 0x%llx", what,
               ci ? ci->line : -1, ctaid[0], ctaid[1], ctaid[2], cw->id, lane,
               (unsigned long long)addr);
      err = b;
    }
    throw 1;
  }
  std::vector<u32> fe;
  std::vector<u64> seen;
  void note(const char* what, u64 addr, int other = -1, u32 ol = 0) {
    u64 key = ((u64)(u32)ci->line << 32 | ol) * 31 + (u64)what;
    if (std::find(seen.begin(), seen.end(), key) != seen.end()) return;
    seen.push_back(key);
    if (nlog < 60) {
      nlog++;
      char b[400];
      snprintf(b, 400,
               "%s: line %d against line %u, cta %u,%u,%u warp %d lane %d address 0x%llx other "
               "0x%x epoch %u\n",
               what, ci->line, ol, ctaid[0], ctaid[1], ctaid[2], cw->id, lane,
               (unsigned long long)addr, other, epoch);
      log += b;
    }
  }
};
template <class T>
static inline T* R(u32* r, s32 o) {
  return (T*)(r + o);
}
