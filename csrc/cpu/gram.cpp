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
constexpr int64_t kBlocks = 64;                // blocks per task
constexpr uint64_t kPrime = (1ull << 61) - 1;  // of the polynomial that joins the blocks
constexpr int64_t kGramRows = 1024;            // classes converted to the accumulator's type at a time

struct Hash {
  uint64_t a = 0, b = 0;
  bool operator==(const Hash&) const = default;
};

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

Hash content_hash(const Tensor& t) {
  static const Keys keys;
  const int64_t bytes = t.numel() * int64_t(t.element_size()), block = 2 * kHalf * 4, n = (bytes + block - 1) / block;
  const int64_t tasks = (n + kBlocks - 1) / kBlocks;
  const char* data = static_cast<const char*>(t.const_data_ptr());
  std::vector<Hash> parts(tasks);
  parallel_for(tasks, 1, [&](int64_t first, int64_t last) {
    std::vector<uint32_t> words(2 * kHalf);
    for (int64_t i = first; i < last; ++i)
      for (int64_t k = i * kBlocks; k < std::min(n, (i + 1) * kBlocks); ++k) {
        const int64_t length = std::min(block, bytes - k * block);
        const char* from = data + k * block;
        if (length < block || reinterpret_cast<uintptr_t>(from) % alignof(uint32_t) != 0) {
          std::fill(words.begin(), words.end(), 0);
          std::memcpy(words.data(), from, length);
          from = reinterpret_cast<const char*>(words.data());
        }
        uint64_t h[2];
        hash_block(reinterpret_cast<const uint32_t*>(from), keys.words, h);
        parts[i] = {join(parts[i].a, keys.points[0], h[0]), join(parts[i].b, keys.points[1], h[1])};
      }
  });
  Hash out;
  for (const Hash& p : parts) out = {join(out.a, keys.points[0], p.a), join(out.b, keys.points[1], p.b)};
  return out;
}

// In chunks of classes, each by the library's GEMM; added in order.
Tensor make_gram(const Tensor& weight, DType acc) {
  const int64_t K = weight.size(0), Ct = weight.size(1);
  const Tensor g = empty(weight, {Ct, Ct}, acc);
  if (weight.scalar_type() == scalar(acc)) {
    matmul_out(torch::stable::transpose(weight, 0, 1), weight, g);
    return g;
  }
  Tensor sum = g;
  torch::stable::zero_(sum);
  const Tensor product = empty(weight, {Ct, Ct}, acc);
  for (int64_t k = 0; k < K; k += kGramRows) {
    const Tensor w = as(rows_of(weight, k, std::min(kGramRows, K - k)), acc);
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
  ScalarType dtype;
  int64_t K, Ct;
  Hash hash;
  Tensor g;
};

}  // namespace

Tensor gram(const Tensor& weight) {
  // Never destroyed: torch may be gone by the time that static objects are.
  static auto* mutex = new std::mutex;
  static auto* kept = new std::list<Kept>;  // the last used first
  const Hash hash = content_hash(weight);
  {
    const std::lock_guard lock(*mutex);
    for (auto i = kept->begin(); i != kept->end(); ++i)
      if (i->dtype == weight.scalar_type() && i->K == weight.size(0) && i->Ct == weight.size(1) && i->hash == hash) {
        kept->splice(kept->begin(), *kept, i);
        return i->g;
      }
  }
  const Tensor g = make_gram(weight, accumulator(dtype(weight, "classifier_loss", "weight")));
  const std::lock_guard lock(*mutex);
  kept->push_front({weight.scalar_type(), weight.size(0), weight.size(1), hash, g});
  if (kept->size() > kGrams) kept->pop_back();
  return g;
}

}  // namespace ijckd
