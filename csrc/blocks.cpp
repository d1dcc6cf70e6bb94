// Host side of the block ops, for the CPU: checks, allocation, registration.
#include "blocks.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "block_args.h"
#include "block_codec.h"
#include "op.h"

namespace ijckd {
namespace {

void check_sides(int64_t h, int64_t w, const char* op) {
  check(h >= 1 && h <= kMostSide && w >= 1 && w <= kMostSide, op, ": the image's sides must lie in [1, ", kMostSide,
        "], got ", h, " x ", w);
}

void check_bytes(const Tensor& t, const char* op, const char* arg) {
  check_device(t, op, arg);
  check(t.scalar_type() == ScalarType::Byte, op, ": ", arg, " must be uint8, got ", name(t.scalar_type()));
}

void check_byte_row(const Tensor& t, const char* op, const char* arg) {
  check_bytes(t, op, arg);
  check(t.dim() == 1, op, ": ", arg, " must be [bytes], got ", shape(t));
}

BlockImage image_of(int64_t h, int64_t w, int64_t luma_bits, int64_t chroma_bits) {
  return {h, w, int(luma_bits), int(chroma_bits)};
}

Tensor block_encode(const Tensor& rgb, int64_t luma_bits, int64_t chroma_bits) {
  const char* op = "block_encode";
  check_bytes(rgb, op, "rgb");
  check_bits(luma_bits, chroma_bits, op);
  check(rgb.dim() == 3 && rgb.size(2) == 3, op, ": rgb must be [h, w, 3], got ", shape(rgb));
  check_sides(rgb.size(0), rgb.size(1), op);
  const BlockImage image = image_of(rgb.size(0), rgb.size(1), luma_bits, chroma_bits);
  const Tensor rows = dense(rgb), out = empty(rgb, {image.bytes()}, ScalarType::Byte);
  encode_blocks(rows.const_data_ptr<uint8_t>(), image, out.mutable_data_ptr<uint8_t>());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> block_planes(const Tensor& data, int64_t h, int64_t w, int64_t luma_bits,
                                                int64_t chroma_bits) {
  const char* op = "block_planes";
  check_byte_row(data, op, "data");
  check_bits(luma_bits, chroma_bits, op);
  check_sides(h, w, op);
  const BlockImage image = image_of(h, w, luma_bits, chroma_bits);
  check(data.size(0) == image.bytes(), op, ": an image of ", h, " x ", w, " pixels takes ", image.bytes(),
        " bytes, got ", data.size(0));
  const Tensor bytes = dense(data);
  const auto plane = [&](int c) {
    const int64_t high = c ? (h + 1) / 2 : h, wide = c ? (w + 1) / 2 : w;
    const Tensor out = empty(data, {high, wide}, ScalarType::Byte);
    decode_blocks(bytes.const_data_ptr<uint8_t>() + image.plane_at(c), image.plane(c), high, wide,
                  out.mutable_data_ptr<uint8_t>());
    return out;
  };
  return {plane(0), plane(1), plane(2)};
}

int64_t checksum_of(const Tensor& data) {
  check_byte_row(data, "block_checksum", "data");
  const Tensor bytes = dense(data);
  return int64_t(block_checksum(bytes.const_data_ptr<uint8_t>(), bytes.size(0)));
}

ViewType view_type(const Tensor& out, const char* op) {
  switch (out.scalar_type()) {
    case ScalarType::Byte:
      return ViewType::u8;
    case ScalarType::Float:
      return ViewType::f32;
    case ScalarType::BFloat16:
      return ViewType::bf16;
    default:
      fail(op, ": out must be uint8, float32 or bfloat16, got ", name(out.scalar_type()));
  }
}

// The row says where bytes are read: nothing may be read before this has passed.
void check_row(const int64_t* row, int64_t b, const std::vector<Tensor>& files, int64_t luma_bits, int64_t chroma_bits,
               int64_t S, const char* op) {
  const int64_t h = row[kHeight], w = row[kWidth];
  check_sides(h, w, op);
  check(row[kFile] >= 0 && row[kFile] < int64_t(files.size()), op, ": row ", b, " names file ", row[kFile], " of ",
        files.size());
  const int64_t bytes = image_of(h, w, luma_bits, chroma_bits).bytes(), size = files[row[kFile]].size(0);
  check(row[kLength] == bytes, op, ": row ", b, ": an image of ", h, " x ", w, " pixels takes ", bytes,
        " bytes, the row says ", row[kLength]);
  check(row[kOffset] >= 0 && row[kOffset] <= size - bytes, op, ": row ", b, ": bytes ", row[kOffset], " to ",
        row[kOffset], " + ", bytes, " must lie within file ", row[kFile], " of ", size, " bytes");
  check(row[kFlip] == 0 || row[kFlip] == 1, op, ": row ", b, ": flip must be 0 or 1, got ", row[kFlip]);
  const int64_t ch = row[kCropHeight], cw = row[kCropWidth], y = row[kTop], x = row[kLeft];
  const int64_t nh = row[kResizedHeight], nw = row[kResizedWidth];
  if (nh == 0 && nw == 0) {
    check(ch >= 1 && cw >= 1 && y >= 0 && x >= 0 && ch <= h && cw <= w && y <= h - ch && x <= w - cw, op, ": row ", b,
          ": a crop of ", ch, " x ", cw, " at (", y, ", ", x, ") must lie within its image of ", h, " x ", w);
    return;
  }
  check(nh >= 1 && nh <= kMostResized && nw >= 1 && nw <= kMostResized, op, ": row ", b,
        ": the sides of the resized image must lie in [1, ", kMostResized, "], or both be 0, got ", nh, " x ", nw);
  check(ch == S && cw == S, op, ": row ", b, ": a crop of a resized image must have the view's size, ", S, " x ", S,
        ", got ", ch, " x ", cw);
  const auto near = [](int64_t at) { return at >= -kMostResized && at <= kMostResized; };
  check(near(y) && near(x), op, ": row ", b, ": a crop must begin within ", kMostResized, " pixels, got (", y, ", ", x,
        ")");
}

// The rows [B, kViewColumns], of which each fits its file and a view of side S.
Tensor checked_rows(const std::vector<Tensor>& files, const Tensor& rows, int64_t luma_bits, int64_t chroma_bits,
                    int64_t S, const char* op) {
  check_bits(luma_bits, chroma_bits, op);
  for (const Tensor& file : files) {
    check_byte_row(file, op, "a file");
    check(file.is_contiguous(), op, ": a file must be contiguous");
  }
  check_view_rows(rows, op);
  const Tensor table = dense(rows);
  for (int64_t b = 0; b < table.size(0); ++b)
    check_row(table.const_data_ptr<int64_t>() + b * kViewColumns, b, files, luma_bits, chroma_bits, S, op);
  return table;
}

bool is_whole(const std::vector<Tensor>& files, const int64_t* row) {
  const uint8_t* data = files[row[kFile]].const_data_ptr<uint8_t>() + row[kOffset];
  return block_checksum(data, row[kLength]) == uint64_t(row[kChecksum]);
}

Tensor block_check(const std::vector<Tensor>& files, const Tensor& rows, int64_t luma_bits, int64_t chroma_bits,
                   int64_t S) {
  const char* op = "block_check";
  check(S >= 1 && S <= kMostViewSide, op, ": side must lie in [1, ", kMostViewSide, "], got ", S);
  const Tensor table = checked_rows(files, rows, luma_bits, chroma_bits, S, op);
  const Tensor status = empty(rows, {table.size(0)}, ScalarType::Byte);
  for (int64_t b = 0; b < table.size(0); ++b)
    status.mutable_data_ptr<uint8_t>()[b] = !is_whole(files, table.const_data_ptr<int64_t>() + b * kViewColumns);
  return status;
}

// lanes, ticks: see BlockView.
Tensor make_views(const char* op, const std::vector<Tensor>& files, const Tensor& rows, int64_t luma_bits,
                  int64_t chroma_bits, const std::vector<double>& shift, const std::vector<double>& scale,
                  const Tensor& out, int lanes, int64_t* ticks) {
  check_view_rows(rows, op);
  const int64_t B = rows.size(0), S = view_side(out, B, op);
  const ViewType type = view_type(out, op);
  float shifts[3], scales[3];
  normalisation(shift, scale, op, shifts, scales);
  const Tensor dense_rows = checked_rows(files, rows, luma_bits, chroma_bits, S, op);
  const Tensor status = empty(rows, {B}, ScalarType::Byte);
  const int64_t* table = dense_rows.const_data_ptr<int64_t>();
  const bool half_way = any_half_way(shifts, scales);
  const int64_t view_bytes = S * S * 3 * (type == ViewType::u8 ? 1 : type == ViewType::f32 ? 4 : 2);
  const auto data = [&](int64_t b) {
    const int64_t* row = table + b * kViewColumns;
    return files[row[kFile]].const_data_ptr<uint8_t>() + row[kOffset];
  };
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* row = table + b * kViewColumns;
    uint8_t* view = static_cast<uint8_t*>(out.mutable_data_ptr()) + b * view_bytes;
    StageClock clock(ticks);
    const bool good = is_whole(files, row);
    clock.lap(ViewStage::checksum);
    status.mutable_data_ptr<uint8_t>()[b] = !good;
    if (!good) {
      std::memset(view, 0, view_bytes);
      continue;
    }
    BlockView v{image_of(row[kHeight], row[kWidth], luma_bits, chroma_bits),
                data(b),
                row,
                S,
                type,
                shifts,
                scales,
                half_way,
                view};
    if (b + 1 < B) v.next = data(b + 1), v.next_bytes = row[kViewColumns + kLength];
    v.lanes = lanes, v.ticks = ticks;
    block_view(v);
  }
  return status;
}

Tensor block_views(const std::vector<Tensor>& files, const Tensor& rows, int64_t luma_bits, int64_t chroma_bits,
                   const std::vector<double>& shift, const std::vector<double>& scale, const Tensor& out) {
  return make_views("block_views", files, rows, luma_bits, chroma_bits, shift, scale, out, kMostLanes, nullptr);
}

Tensor block_view_ticks(const std::vector<Tensor>& files, const Tensor& rows, int64_t luma_bits, int64_t chroma_bits,
                        const std::vector<double>& shift, const std::vector<double>& scale, const Tensor& out,
                        int64_t lanes, bool clock) {
  const char* op = "block_view_ticks";
  check(lanes == 8 || lanes == 16 || lanes == 32, op, ": lanes must be 8, 16 or 32, got ", lanes);
  const Tensor ticks = empty(rows, {kViewStages}, ScalarType::Long);
  int64_t* each = ticks.mutable_data_ptr<int64_t>();
  std::fill_n(each, kViewStages, 0);
  make_views(op, files, rows, luma_bits, chroma_bits, shift, scale, out, int(lanes), clock ? each : nullptr);
  return ticks;
}

}  // namespace
}  // namespace ijckd

STABLE_TORCH_LIBRARY_IMPL(ijckd, CPU, m) {
  m.impl("block_encode", TORCH_BOX(&ijckd::block_encode));
  m.impl("block_planes", TORCH_BOX(&ijckd::block_planes));
  m.impl("block_checksum", TORCH_BOX(&ijckd::checksum_of));
  m.impl("block_check", TORCH_BOX(&ijckd::block_check));
  m.impl("block_views", TORCH_BOX(&ijckd::block_views));
  m.impl("block_view_ticks", TORCH_BOX(&ijckd::block_view_ticks));
}
