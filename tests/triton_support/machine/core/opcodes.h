// What the decoder may emit, by name: decode.py reads the list from the built library.
#pragma once
#define OPS(X)                                                                                           \
  X(nop)                                                                                                 \
  X(bra) X(ret) X(bar) X(mov32) X(mov64) X(movp) X(pack16) X(unpack16) X(pack32) X(unpack32) X(          \
      add32) X(sub32) X(mul32) X(mad32) X(add64) X(sub64) X(mul64) X(mad64) X(mulhi_u16)                 \
      X(mulhi_s16) X(mulhi_u64) X(mulhi_s64) X(abs_s64) X(mulhi_u32) X(mulhi_s32) X(mulw_u32) X(         \
          mulw_s32) X(mulw_u16) X(mulw_s16) X(madw_u16) X(madw_s16) X(madw_u32) X(madw_s32)              \
          X(div_s32) X(div_u32) X(rem_s32) X(rem_u32) X(div_s64) X(div_u64) X(rem_s64) X(                \
              rem_u64) X(min_s32) X(max_s32) X(min_u32) X(max_u32) X(min_s64) X(max_s64)                 \
              X(min_u64) X(max_u64) X(neg32) X(neg64) X(not32) X(not64) X(abs_s32) X(and32) X(or32) X(   \
                  xor32) X(and64) X(or64) X(xor64) X(andp) X(orp) X(xorp) X(notp) X(shl32)               \
                  X(shr_u32) X(shr_s32) X(shl64) X(shr_u64) X(shr_s64) X(shl16) X(shr_u16) X(shr_s16) X( \
                      add16) X(sub16) X(mul16) X(not16) X(bfe_u32)                                       \
                      X(bfe_s32) X(bfe_u64) X(bfi32) X(prmt) X(lop3) X(shfl_wrap) X(shfr_wrap) X(        \
                          popc32) X(clz32) X(brev32) X(selp32)                                           \
                          X(selp64) X(setp_s32) X(setp_u32) X(setp_s64) X(setp_u64) X(setp_s16) X(       \
                              setp_u16) X(setp_f32)                                                      \
                              X(setp_f64)                                                                \
                                  X(setp_bf16) X(setp_f16) X(                                            \
                                      cvt_int) X(cvt_f32_bf16) X(cvt_f32_f16) X(cvt_bf16_f32)            \
                                      X(cvt_f16_f32) X(cvt_bf16x2) X(cvt_f16x2) X(cvt_f32_s32) X(        \
                                          cvt_f32_u32) X(cvt_f32_s64) X(cvt_f32_u64) X(cvt_s32_f32)      \
                                          X(cvt_f64_f32) X(cvt_f32_f64) X(cvt_tf32) X(                   \
                                              cvt_floor) X(addf) X(subf) X(mulf)                         \
                                              X(fmaf_) X(divf) X(negf) X(absf) X(minf) X(maxf) X(        \
                                                  ex2f) X(lg2f)                                          \
                                                  X(rcpf)                                                \
                                                      X(sqrtf_) X(rsqrtf_) X(tanhf_) X(                  \
                                                          sinf_) X(cosf_)                                \
                                                          X(copysignf_) X(addd) X(subd) X(muld) X(       \
                                                              fmad) X(negbf)                             \
                                                              X(negbf2) X(absbf) X(absbf2) X(            \
                                                                  bin_h) X(fma_h) X(bin_h2)              \
                                                                  X(fma_h2) X(shfl) X(vote) X(           \
                                                                      ldp) X(ldg) X(stg) X(lds)          \
                                                                      X(sts) X(cpasync) X(               \
                                                                          cpcommit) X(cpwait)            \
                                                                          X(cpwaitall) X(                \
                                                                              ldmatrix) X(stmatrix)      \
                                                                              X(mma16) X(mma8tf) X(      \
                                                                                  fenceproxy)            \
                                                                                  X(wgfence) X(          \
                                                                                      wgcommit)          \
                                                                                      X(wgwait)          \
                                                                                          X(wgmma)
enum Op {
#define X(n) n,
  OPS(X)
#undef X

};
static const char* NAMES =
#define X(n) #n " "
    OPS(X)
#undef X
    ;
extern "C" const char* op_names() { return NAMES; }
