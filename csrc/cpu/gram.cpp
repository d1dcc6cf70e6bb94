#include "gram.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>
#include <vector>

#include "gemm.h"
#include "loops.h"
#include "vectorise.h"

namespace ijckd {
namespace {

constexpr size_t kGrams = 4;
constexpr int64_t kHalf = 2048;                // words in half a hashed block of 16 KiB
constexpr uint64_t kPrime = (1ull << 61) - 1;  // of the polynomial that joins the blocks
constexpr int64_t kGramRows = 1024;            // classes converted to the accumulator's type at a time

// Pseudo-random words, the same in every process.
struct Keys {
  uint32_t words[2 * kHalf + 2];
  uint64_t points[2];
  Keys() {
    uint64_t state = 0x9e3779b97f4a7c15ull;
    const auto next = [&] {  // splitmix64
      uint64_t v = state += 0x9e3779b97f4a7c15ull;
      v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
      v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
      return v ^ (v >> 31);
    };
    for (uint32_t& w : words) w = uint32_t(next());
    for (uint64_t& p : points) p = next() % kPrime;
  }
};

// NH of UMAC, twice with shifted keys: for random keys, two different blocks collide with probability 2^-64.
IJCKD_CLONES void hash_block(const uint32_t* words, const uint32_t* keys, uint64_t* out) {
  uint64_t a = 0, b = 0;
  for (int64_t i = 0; i < kHalf; ++i) {
    a += uint64_t(words[i] + keys[i]) * uint64_t(words[i + kHalf] + keys[i + kHalf]);
    b += uint64_t(words[i] + keys[i + 1]) * uint64_t(words[i + kHalf] + keys[i + kHalf + 1]);
  }
  out[0] = a, out[1] = b;
}

// The polynomial's next step modulo kPrime; `value` in two parts, both below it.
uint64_t join(uint64_t hash, uint64_t point, uint64_t value) {
  for (const uint64_t part : {value >> 32, value & uint64_t(0xffffffff)}) {
    const unsigned __int128 v = static_cast<unsigned __int128>(hash) * point + part + 1;
    hash = (uint64_t(v) & kPrime) + uint64_t(v >> 61);
    hash = hash >= kPrime ? hash - kPrime : hash;
  }
  return hash;
}

// In chunks of classes, each by the library's GEMM; added in order.
Tensor make_gram(const Tensor& weight, DType t, DType rounding) {
  const int64_t K = weight.size(0), Ct = weight.size(1);
  const DType acc = accumulator(t);
  const Tensor g = empty(weight, {Ct, Ct}, acc);
  if (weight.scalar_type() == scalar(acc) && rounding == acc) {
    matmul_out(torch::stable::transpose(weight, 0, 1), weight, g);
    return g;
  }
  Tensor sum = g;
  torch::stable::zero_(sum);
  const Tensor product = empty(weight, {Ct, Ct}, acc);
  for (int64_t k = 0; k < K; k += kGramRows) {
    const Tensor w = as(as(rows_of(weight, k, std::min(kGramRows, K - k)), rounding), acc);
    matmul_out(torch::stable::transpose(w, 0, 1), w, product);
    float* to = g.mutable_data_ptr<float>();
    const float* from = product.const_data_ptr<float>();
    parallel_for(Ct, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first * Ct; i < last * Ct; ++i) to[i] += from[i];
    });
  }
  return g;
}

struct Kept {
  DType dtype;
  int64_t K, Ct;
  Hash hash;
  Tensor g;
};

}  // namespace

Hash content_hash(const void* data, int64_t bytes) {
  constexpr int64_t kBlock = 2 * kHalf * 4;
  static const Keys keys;
  std::vector<uint32_t> words;  // of a block that is too short or lies askew
  Hash out;
  for (int64_t at = 0; at < bytes; at += kBlock) {
    const int64_t length = std::min(kBlock, bytes - at);
    const char* from = static_cast<const char*>(data) + at;
    if (length < kBlock || reinterpret_cast<uintptr_t>(from) % alignof(uint32_t) != 0) {
      words.assign(2 * kHalf, 0);
      std::memcpy(words.data(), from, length);
      from = reinterpret_cast<const char*>(words.data());
    }
    uint64_t h[2];
    hash_block(reinterpret_cast<const uint32_t*>(from), keys.words, h);
    out = {join(out.a, keys.points[0], h[0]), join(out.b, keys.points[1], h[1])};
  }
  return out;
}

Tensor gram(const Tensor& weight, DType t, DType rounding, const std::vector<Hash>& rows) {
  // Never destroyed: torch may be gone by the time that static objects are.
  static auto* mutex = new std::mutex;
  static auto* kept = new std::list<Kept>;  // the last used first
  const Hash hash = content_hash(rows.data(), int64_t(rows.size() * sizeof(Hash)));
  {
    const std::lock_guard lock(*mutex);
    for (auto i = kept->begin(); i != kept->end(); ++i)
      if (i->dtype == t && i->K == weight.size(0) && i->Ct == weight.size(1) && i->hash == hash) {
        kept->splice(kept->begin(), *kept, i);
        return i->g;
      }
  }
  const Tensor g = make_gram(weight, t, rounding);
  const std::lock_guard lock(*mutex);
  kept->push_front({t, weight.size(0), weight.size(1), hash, g});
  if (kept->size() > kGrams) kept->pop_back();
  return g;
}

}  // namespace ijckd
