#include "gram.h"

#include <algorithm>
#include <cmath>
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
constexpr int64_t kGramRows = 1024;            // classes converted to double at a time
constexpr int64_t kDirections = 16;            // at most, kept beside the rest of G
constexpr int kSteps = 12;                     // of the iteration that finds them
constexpr double kStandsOut = 4;  // times the mean of G's other eigenvalues, which those of a random W do not reach

// Pseudo-random words, the same in every process: splitmix64.
struct Words {
  uint64_t state = 0x9e3779b97f4a7c15ull;
  uint64_t operator()() {
    uint64_t v = state += 0x9e3779b97f4a7c15ull;
    v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
    v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
    return v ^ (v >> 31);
  }
};

struct Keys {
  uint32_t words[2 * kHalf + 2];
  uint64_t points[2];
  Keys() {
    Words next;
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

double* doubles(const Tensor& t) { return t.mutable_data_ptr<double>(); }

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Rows of x [n, Ct] made orthonormal, one after the other; what then has no length left becomes 0.
void orthonormalise(double* x, int64_t n, int64_t Ct) {
  for (int64_t i = 0; i < n; ++i) {
    double* row = x + i * Ct;
    const double before = std::sqrt(dot(row, row, Ct));
    for (int twice = 0; twice < 2; ++twice)
      for (int64_t j = 0; j < i; ++j) {
        const double share = dot(row, x + j * Ct, Ct);
        for (int64_t c = 0; c < Ct; ++c) row[c] -= share * x[j * Ct + c];
      }
    const double length = std::sqrt(dot(row, row, Ct));
    const double scale = length > 1e-12 * before ? 1 / length : 0;
    for (int64_t c = 0; c < Ct; ++c) row[c] *= scale;
  }
}

// Takes the directions that stand out from g [Ct, Ct] in double: subspace iteration, the same in every process. They
// need not be exact: what is taken is what is kept.
void take_directions(Gram& out, const Tensor& g, double trace) {
  const int64_t Ct = g.size(0), most = std::min(kDirections, Ct / 4);
  if (most == 0 || !(trace > 0)) return;
  Tensor x = empty(g, {most, Ct}, DType::f64), product = empty(g, {most, Ct}, DType::f64);
  Words next;
  for (int64_t i = 0; i < most * Ct; ++i) doubles(x)[i] = double(int64_t(next()));
  for (int step = 0; step < kSteps; ++step) {
    orthonormalise(doubles(x), most, Ct);
    matmul_out(x, g, product);
    std::swap(x, product);
  }
  orthonormalise(doubles(x), most, Ct);
  matmul_out(x, g, product);
  const double *u = doubles(x), *gu = doubles(product);
  double rest = trace;
  for (int64_t& r = out.count; r < most; ++r) {
    const double size = dot(u + r * Ct, gu + r * Ct, Ct);
    rest -= size;
    if (!(size > kStandsOut * std::max(rest, 0.0) / double(Ct))) break;
  }
  const int64_t r = out.count;
  out.directions.assign(u, u + r * Ct);
  // A whole matrix: directions of about the same size are not told apart.
  for (int64_t i = 0; i < r * r; ++i) out.sizes.push_back(dot(u + i / r * Ct, gu + i % r * Ct, Ct));
  parallel_for(Ct, 16, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      for (int64_t i = 0; i < r * r; ++i) {
        const double factor = out.sizes[i] * u[i / r * Ct + row];
        const double* other = u + i % r * Ct;
        for (int64_t c = 0; c < Ct; ++c) doubles(g)[row * Ct + c] -= factor * other[c];
      }
  });
}

// Summed in double, in chunks of classes, each by the library's GEMM; added in order.
std::shared_ptr<const Gram> make_gram(const Tensor& weight, DType t, DType rounding) {
  const int64_t K = weight.size(0), Ct = weight.size(1);
  const DType acc = accumulator(t);
  Tensor g = empty(weight, {Ct, Ct}, DType::f64);
  torch::stable::zero_(g);
  const Tensor product = empty(weight, {Ct, Ct}, DType::f64);
  auto out = std::make_shared<Gram>();
  double logs = 0;
  for (int64_t k = 0; k < K; k += kGramRows) {
    const int64_t n = std::min(kGramRows, K - k);
    const Tensor w = as(as(rows_of(weight, k, n), rounding), DType::f64);
    matmul_out(transposed(w), w, product);
    double *to = doubles(g), *from = doubles(product);
    parallel_for(Ct, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first * Ct; i < last * Ct; ++i) to[i] += from[i];
    });
    for (int64_t i = 0; i < n; ++i) {
      const double* row = w.const_data_ptr<double>() + i * Ct;
      const double square = dot(row, row, Ct);
      logs += std::log(square) / 2;
      out->fourth_powers += square * square;
    }
  }
  out->row_norm = std::exp(logs / double(K));
  double trace = 0, largest = 0;
  for (int64_t i = 0; i < Ct; ++i) {
    trace += doubles(g)[i * Ct + i];
    largest = std::max(largest, doubles(g)[i * Ct + i]);
  }
  out->in_range = std::isfinite(trace) &&
                  (acc == DType::f64 ? largest > 1e-290 && largest < 1e290 : largest > 1e-30 && largest < 1e30);
  if (acc != DType::f64 && out->in_range) take_directions(*out, g, trace);
  out->rest = as(g, acc);
  out->diagonal.resize(Ct);
  out->squares.resize(Ct);
  for (int64_t i = 0; i < Ct; ++i) {
    const double* row = doubles(g) + i * Ct;  // its column, too
    out->diagonal[i] = row[i];
    out->squares[i] = dot(row, row, Ct);
  }
  return out;
}

struct Kept {
  DType dtype;
  int64_t K, Ct;
  Hash hash;
  std::shared_ptr<const Gram> g;
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

std::shared_ptr<const Gram> gram(const Tensor& weight, DType t, DType rounding, const std::vector<Hash>& rows) {
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
  auto g = make_gram(weight, t, rounding);
  const std::lock_guard lock(*mutex);
  kept->push_front({t, weight.size(0), weight.size(1), hash, g});
  if (kept->size() > kGrams) kept->pop_back();
  return g;
}

}  // namespace ijckd
