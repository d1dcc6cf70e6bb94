// Host side of block_views_at.
#include "cuda/block_views.h"

#include "block_args.h"

namespace ijckd {
namespace {

Pixels pixels(const Tensor& out, const char* op) {
  switch (out.scalar_type()) {
    case ScalarType::Byte:
      return Pixels::u8;
    case ScalarType::Float:
      return Pixels::f32;
    case ScalarType::BFloat16:
      return Pixels::bf16;
    case ScalarType::Half:
      return Pixels::f16;
    default:
      fail(op, ": out must be uint8, float32, bfloat16 or float16, got ", name(out.scalar_type()));
  }
}

Tensor block_views_at(const Tensor& files, const Tensor& rows, int64_t luma_bits, int64_t chroma_bits,
                      const std::vector<double>& shift, const std::vector<double>& scale, const Tensor& out) {
  const char* op = "block_views_at";
  check_bits(luma_bits, chroma_bits, op);
  check_device(files, op, "files");
  check(files.scalar_type() == ScalarType::Long && files.dim() == 2 && files.size(1) == 2, op,
        ": files must be int64 [files, 2], addresses and bytes, got ", name(files.scalar_type()), " ", shape(files));
  check_view_rows(rows, op);
  const int64_t B = rows.size(0), S = view_side(out, B, op);
  check(B <= kMostViews, op, ": at most ", kMostViews, " views can be made at a time, got ", B);
  const Tensor table = dense(files), dense_rows = dense(rows), status = empty(rows, {B}, ScalarType::Byte);
  BlockViews v{table.const_data_ptr<int64_t>(),
               table.size(0),
               dense_rows.const_data_ptr<int64_t>(),
               int(luma_bits),
               int(chroma_bits),
               pixels(out, op),
               {},
               {},
               out.mutable_data_ptr(),
               status.mutable_data_ptr<uint8_t>(),
               B,
               S};
  normalisation(shift, scale, op, v.shift, v.scale);
  if (B == 0) return status;
  Launch launch(rows);
  launched(block_views(v, launch.stream), op);
  return status;
}

}  // namespace
}  // namespace ijckd

STABLE_TORCH_LIBRARY_IMPL(ijckd, CUDA, m) { m.impl("block_views_at", TORCH_BOX(&ijckd::block_views_at)); }
