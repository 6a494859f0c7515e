// Every access to memory: bounds, alignment, races, uninitialised bytes, copies in flight.
#pragma once
#include "state.h"
template <bool W, bool G>
static inline void touch(Emu& e, Sh* s, u32 n, u64 addr, const u8* cur, const u8* nv) {
  u32 w = e.cw->id, ep = e.epoch;
  for (u32 i = 0; i < n; i++) {
    Sh& x = s[i];
    if (x.pend && !(G)) {
      e.st.pend++;
      e.note("touches bytes a cp.async is still writing", addr + 2 * i, x.ww);
    }
    if (x.wep == ep && x.ww != w) {
      bool same = W && cur && nv && memcmp(cur + 2 * i, nv + 2 * i, 2) == 0;
      if (same) {
        if (G)
          e.st.benign_g++;
        else
          e.st.benign_ww++;
      } else {
        if (G)
          e.st.races_g++;
        else
          e.st.races_s++;
        e.note(W ? (G ? "global WW race" : "shared WW race")
                 : (G ? "global RAW race" : "shared RAW race"),
               addr + 2 * i, x.ww, x.wl);
      }
    }
    if (W && x.rep == ep && (x.rm & ~(1u << w))) {
      if (G)
        e.st.races_g++;
      else
        e.st.races_s++;
      e.note(G ? "global WAR race" : "shared WAR race", addr + 2 * i, (int)x.rm, x.rl);
    }
    if (G) {
      if (x.wcta >= e.cta0 && x.wcta != e.cta) {
        bool same = W && cur && nv && memcmp(cur + 2 * i, nv + 2 * i, 2) == 0;
        if (same)
          e.st.benign_g++;
        else {
          e.st.races_cta++;
          e.note(W ? "WW between programs" : "read of another program's write", addr + 2 * i,
                 x.wcta - e.cta0, x.wl);
        }
      }
      if (W && x.rcta >= e.cta0 && x.rcta != e.cta) {
        e.st.races_cta++;
        e.note("write of what another program read", addr + 2 * i, x.rcta - e.cta0, x.rl);
      }
      if (W)
        x.wcta = e.cta;
      else if (!(x.rcta >= e.cta0 && x.rcta != e.cta))
        x.rcta = e.cta;
    } else {
      if (!W && !x.init) {
        e.st.uninit_s++;
        e.note("uninitialised shared read", addr + 2 * i);
      }
    }
    if (W) {
      x.wl = e.ci->line;
      x.wep = ep;
      x.ww = w;
      x.init = 1;
      x.fence = (u8)(e.cw->fences % 255);
    } else {
      if (x.rep != ep) {
        x.rep = ep;
        x.rm = 0;
      }
      x.rm |= 1u << w;
      x.rl = e.ci->line;
    }
  }
}
static inline u8* gptr(Emu& e, u64 a, u32 size, Sh*& sh) {
  u64 k = a >> 40, off = a & ((1ull << 40) - 1);
  if (a % size && size > 1) {
    e.st.misal++;
    e.fault("misaligned global access", a);
  }
  if (k == 0 || k > e.al.size()) e.fault("global access outside every allocation", a);
  Alloc& al = e.al[k - 1];
  if (off + size > al.size) e.fault("global access out of bounds", a);
  sh = al.sh + off / 2;
  return al.host + off;
}
static inline u8* sptr(Emu& e, u64 a, u32 size, Sh*& sh) {
  if (size > 1 && a % size) {
    e.st.misal++;
    e.fault("misaligned shared access", a);
  }
  if (a + size > e.sm.size()) e.fault("shared access out of bounds", a);
  sh = e.ssh.data() + a / 2;
  return e.sm.data() + a;
}
// What nobody has written is this, twice in a word: a NaN in every floating-point type of 16 and
// 32 bits, so no result of a kernel.
static const u16 UNWRITTEN = 0x7fa5;
static inline void unwritten(Emu& e, const u8* p, u32 element, u32 size, u64 a) {
  for (u32 i = 0; element > 1 && i < size; i += element) {
    bool all = true;
    for (u32 k = 0; k < element; k += 2) {
      u16 x;
      memcpy(&x, p + i + k, 2);
      all &= x == UNWRITTEN;
    }
    if (all) {
      e.st.uninit_g++;
      e.note("uninitialised global read", a + i);
      return;
    }
  }
}
static void docp(Emu& e, const Cp& c, bool issue, bool move) {
  Sh* sh;
  e.lane = c.lane;
  u8 buf[16];
  memset(buf, 0, 16);
  if (c.n) {
    Sh* gs;
    u8* g = gptr(e, c.src, c.size,
                 gs);  // the source must be aligned to the copy's size; only n bytes are read
    memcpy(buf, g, c.n);
    unwritten(e, g, 4, c.n & ~3u, c.src);
    touch<false, true>(e, gs, (c.n + 1) / 2, c.src, 0, 0);
  }
  u8* d = sptr(e, c.dst, c.size, sh);
  if (!issue)
    for (u32 i = 0; i < c.size / 2; i++) sh[i].pend = 0;
  touch<true, false>(e, sh, c.size / 2, c.dst, 0, 0);
  for (u32 i = 0; i < c.size / 2; i++) sh[i].fence = 255;
  if (move) memcpy(d, buf, c.size);
  if (issue)
    for (u32 i = 0; i < c.size / 2; i++) sh[i].pend = 1;
}
static void sreadrow(Emu& e, u64 a, u8* out) {
  Sh* s;
  u8* p = sptr(e, a, 16, s);
  touch<false, false>(e, s, 8, a, 0, 0);
  memcpy(out, p, 16);
}
