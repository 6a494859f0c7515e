// wgmma: operands in shared memory by descriptor and swizzle, or in registers.
#pragma once
#include "memory.h"
#include "numbers.h"
static inline u32 wgaddr(u64 d, bool trans, u32 mn, u32 k) {
  u32 start = (u32)(d & 0x3fff) << 4, lbo = (u32)((d >> 16) & 0x3fff) << 4,
      sbo = (u32)((d >> 32) & 0x3fff) << 4, sw = (u32)(d >> 62) & 3, a;
  u32 width = sw == 1 ? 128 : sw == 2 ? 64 : sw == 3 ? 32 : 16;
  u32 per = width / 2;
  if (!trans) {
    if (sw == 0)
      a = start + (mn / 8) * sbo + (mn % 8) * 16 + (k / 8) * lbo + (k % 8) * 2;
    else
      a = start + (mn / 8) * sbo + (mn % 8) * width + k * 2;
  } else {
    if (sw == 0)
      a = start + (mn / 8) * sbo + (k / 8) * lbo + (k % 8) * 16 + (mn % 8) * 2;
    else
      a = start + (mn / per) * lbo + (k / 8) * sbo + (k % 8) * width + (mn % per) * 2;
  }
  if (sw == 1)
    a ^= ((a >> 7) & 7) << 4;
  else if (sw == 2)
    a ^= ((a >> 7) & 3) << 4;
  else if (sw == 3)
    a ^= ((a >> 7) & 1) << 4;
  return a;
}
static u16 wgread(Emu& e, u32 a) {
  Sh* s;
  u8* p = sptr(e, a, 2, s);
  touch<false, false>(e, s, 1, a, 0, 0);
  u16 v;
  memcpy(&v, p, 2);
  return v;
}
static void checkproxy(Emu& e, u32 a, std::vector<u32>& fc) {
  Sh& s = e.ssh[a / 2];
  if (s.init && s.fence == 255) {
    if (!(e.fe[e.cw->id] > s.wep)) {
      e.st.proxy_cp++;
      e.note("wgmma reads what cp.async wrote, with no fence.proxy.async since", a, s.ww);
    }
  } else if (s.init && s.ww < fc.size() && (u8)(fc[s.ww] % 255) == s.fence &&
             !(e.fe[e.cw->id] > s.wep)) {
    e.st.proxy++;
    e.note("wgmma reads what no fence.proxy.async published", a, s.ww);
  }
}
static void dowg(Emu& e, Warp& w, const Wg& g, bool write, std::vector<u32>& fc) {
  const Ins& in = *g.in;
  const s32* o = e.pool + in.ext;
  int N = in.aux & 0xffff;
  bool ra = in.aux & (1 << 16), f16 = in.aux & (1 << 17), ta = in.aux & (1 << 18),
       tb = in.aux & (1 << 19);
  e.ci = &in;
  static thread_local std::vector<float> A(16 * 16), B(256 * 16);
  int wr = w.id % 4;
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++) {
      u32 v;
      if (ra) {
        int reg = (m >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0);
        int ln = (m % 8) * 4 + (k % 8) / 2;
        v = (g.regsA[reg * 32 + ln] >> (16 * (k & 1))) & 0xffff;
      } else {
        u32 a = wgaddr(g.da, ta, wr * 16 + m, k);
        checkproxy(e, a, fc);
        v = wgread(e, a);
      }
      A[m * 16 + k] = f16 ? h2f(v) : bf2f(v);
    }
  for (int n = 0; n < N; n++)
    for (int k = 0; k < 16; k++) {
      u32 a = wgaddr(g.db, tb, n, k);
      checkproxy(e, a, fc);
      u32 v = wgread(e, a);
      B[n * 16 + k] = f16 ? h2f(v) : bf2f(v);
    }
  if (!write) return;
  for (int t = 0; t < N / 8; t++)
    for (int ln = 0; ln < 32; ln++)
      for (int j = 0; j < 4; j++) {
        int m = ln / 4 + (j >= 2 ? 8 : 0), n = t * 8 + (ln % 4) * 2 + (j & 1);
        float* d = R<float>(w.r, o[t * 4 + j]);
        double s = g.scaleD ? d[ln] : 0.0;
        for (int k = 0; k < 16; k++) s += (double)A[m * 16 + k] * B[n * 16 + k];
        d[ln] = (float)s;
      }
  e.st.mma++;
}
