// Executes decoded PTX, one CTA at a time, a warp an instruction, 32 lanes a loop.
#include "macros.h"
#include "wgmma.h"
static bool run(Emu& e, Warp& w, std::vector<u32>& fc) {  // to the next barrier or the end
  u32* r = w.r;
  e.cw = &w;
  u64 count = 0;
  while (true) {
    if (w.f.empty()) {
      for (auto& g : w.groups)
        for (auto& c : g) docp(e, c, false, e.lazy);
      for (auto& c : w.open) docp(e, c, false, e.lazy);
      w.groups.clear();
      w.open.clear();
      w.done = true;
      break;
    }
    size_t b = 0;
    for (size_t i = 1; i < w.f.size(); i++)
      if (w.f[i].pc < w.f[b].pc) b = i;
    for (size_t i = 0; i < w.f.size();)
      if (i != b && w.f[i].pc == w.f[b].pc) {
        w.f[b].mask |= w.f[i].mask;
        w.f.erase(w.f.begin() + i);
        if (i < b) b--;
      } else
        i++;
    s32 stop = 0x7fffffff;
    for (size_t i = 0; i < w.f.size(); i++)
      if (i != b) stop = std::min(stop, w.f[i].pc);
    u32 all = w.f[b].mask;
    s32 pc = w.f[b].pc;
    bool whole = w.f.size() == 1;
    bool leave = false;
    u32 live = 0;
    for (auto& f : w.f) live |= f.mask;
    while (!leave) {
      if (pc >= stop) {
        w.f[b].pc = pc;
        break;
      }
      if (pc >= e.ncode) {
        e.ci = 0;
        e.fault("ran off the end");
      }
      const Ins& in = e.code[pc];
      e.ci = &in;
      const s32* o = e.pool + in.ext;
      u32 m = all;
      if (in.pred >= 0) m &= in.pneg ? ~r[in.pred] : r[in.pred];
      pc++;
      count++;
      e.counts[in.op]++;
      if (count > e.maxinstr) e.fault("too many instructions");
      if (in.op == bra) {
        u32 t = m, n = all & ~m;
        if (!n) {
          pc = (s32)in.imm;
          if (!whole) {
            w.f[b].pc = pc;
            leave = true;
          }
        } else if (t) {
          e.st.divergent++;
          w.f[b].pc = pc;
          w.f[b].mask = n;
          w.f.push_back({(s32)in.imm, t});
          leave = true;
        }
        continue;
      }
      if (in.op == ret) {
        u32 n = all & ~m;
        if (n) {
          w.f[b].pc = pc;
          w.f[b].mask = n;
        } else
          w.f.erase(w.f.begin() + b);
        leave = true;
        continue;
      }
      if (in.op == bar) {
        if (m != all) e.fault("predicated bar.sync");
        if (!whole) e.fault("bar.sync in divergent code");
        w.f[b].pc = pc;
        w.atbar = true;
        w.barpc = pc;
        e.st.instr += count;
        return true;
      }
      if (!m && in.op != setp_s32) {
        if (in.op != cpcommit && in.op != cpwait) continue;
      }
      switch (in.op) {
        case nop: break;
        case fenceproxy:
          w.fences++;
          fc[w.id] = w.fences;
          e.fe[w.id] = e.epoch;
          break;
#include "integers.inc"
#include "floats.inc"
#include "accesses.inc"
#include "fragments.inc"
        default: e.fault("no such operation");
      }
    }
  }
  e.st.instr += count;
  return false;
}
extern "C" int launch(const Ins* code, int ncode, const s32* pool, const u32* tmpl, int words,
                      int nwarps, const s32* special /*tid, ctaid xyz, warpid, laneid*/, u8** hosts,
                      u64* sizes, void** shadows, int nal, int smem, const u8* params,
                      const u32* grid, u64 seed, int lazy, u32* counters /*epoch,cta: in and out*/,
                      u64 maxinstr, u64* stats, u64* counts, char* err, int errlen, char* log,
                      int loglen) {
  Emu e;
  e.code = code;
  e.ncode = ncode;
  e.pool = pool;
  e.tmpl = tmpl;
  e.words = words;
  e.nwarps = nwarps;
  e.params = params;
  memset(&e.st, 0, sizeof(Stats));
  e.counts = counts;
  e.nlog = 0;
  e.lazy = lazy & 1;
  e.poison = lazy & 2;
  e.maxinstr = maxinstr;
  e.epoch = counters[0];
  e.cta = counters[1];
  e.cta0 = e.cta + 1;
  e.lane = -1;
  e.ci = 0;
  for (int i = 0; i < nal; i++) e.al.push_back({hosts[i], sizes[i], (Sh*)shadows[i]});
  e.sm.resize(smem);
  e.ssh.resize(smem / 2 + 1);
  std::mt19937_64 rng(seed);
  std::vector<u32*> rf;
  for (int i = 0; i < nwarps; i++) {
    u32* p = (u32*)aligned_alloc(64, ((size_t)words * 4 + 63) / 64 * 64);
    rf.push_back(p);
  }
  u64 total = (u64)grid[0] * grid[1] * grid[2];
  std::vector<u64> order(total);
  for (u64 i = 0; i < total; i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), rng);
  int rc = 0;
  std::vector<Warp> ws(nwarps);
  std::vector<u32> fc(nwarps);
  e.fe.assign(nwarps, 0);
  try {
    for (u64 t = 0; t < total; t++) {
      u64 id = order[t];
      e.ctaid[0] = id % grid[0];
      e.ctaid[1] = id / grid[0] % grid[1];
      e.ctaid[2] = id / grid[0] / grid[1];
      e.cta++;
      e.epoch++;
      memset(e.sm.data(), 0xff, e.sm.size());
      memset((void*)e.ssh.data(), 0, e.ssh.size() * sizeof(Sh));
      for (int i = 0; i < nwarps; i++) {
        Warp& w = ws[i];
        w.r = rf[i];
        memcpy(w.r, tmpl, (size_t)words * 4);
        w.f.assign(1, {0, 0xffffffffu});
        w.done = w.atbar = false;
        w.id = i;
        w.open.clear();
        w.groups.clear();
        w.wopen.clear();
        w.wgroups.clear();
        w.fences = 1;
        fc[i] = 1;
        for (int l = 0; l < 32; l++) {
          if (special[0] >= 0) w.r[special[0] + l] = i * 32 + l;
          for (int k = 0; k < 3; k++)
            if (special[1 + k] >= 0) w.r[special[1 + k] + l] = e.ctaid[k];
          if (special[4] >= 0) w.r[special[4] + l] = i;
          if (special[5] >= 0) w.r[special[5] + l] = l;
        }
      }
      std::vector<int> p(nwarps);
      for (int i = 0; i < nwarps; i++) p[i] = i;
      while (true) {
        std::shuffle(p.begin(), p.end(), rng);
        bool any = false;
        for (int i : p)
          if (!ws[i].done) {
            ws[i].atbar = false;
            run(e, ws[i], fc);
          }
        s32 bp = -1;
        int nd = 0;
        for (auto& w : ws) {
          if (w.atbar && !w.done) {
            any = true;
            if (bp < 0)
              bp = w.barpc;
            else if (bp != w.barpc) {
              e.cw = &w;
              e.fault("warps wait at different barriers");
            }
          } else
            nd++;
        }
        if (!any) break;
        if (nd) {
          e.cw = &ws[0];
          e.fault("a warp left while others wait at a barrier");
        }
        e.epoch++;
        e.st.bars++;
      }
    }
  } catch (int) { rc = 1; }
  for (auto p : rf) free(p);
  counters[0] = e.epoch;
  counters[1] = e.cta;
  memcpy(stats, &e.st, sizeof(Stats));
  snprintf(err, errlen, "%s", e.err.c_str());
  snprintf(log, loglen, "%s", e.log.c_str());
  return rc;
}
