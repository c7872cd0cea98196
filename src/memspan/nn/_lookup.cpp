// Hashing by signs and the weighted sum of table rows, forward and backward, for memspan.nn.lookup.
//
// Plain functions with C names, compiled when first used and called through ctypes. All arrays are dense and
// row-major: code and weight (n, K), tables (K, R, h), y and dy (n, h). Sums are kept in float (double where the
// tables are double).

#ifdef MEMSPAN_PYTHON  // Python's headers are here: its own way to call costs a tenth of that through ctypes
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(bf16 v) {
  uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
inline void store(float* at, float v) { *at = v; }
inline void store(double* at, double v) { *at = v; }
inline void store(bf16* at, float v) {  // round to nearest even; NaN stays NaN
  uint32_t wide;
  std::memcpy(&wide, &v, 4);
  at->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}
#ifdef __FLT16_MANT_DIG__
inline float load(_Float16 v) { return static_cast<float>(v); }
inline void store(_Float16* at, float v) { *at = static_cast<_Float16>(v); }
#endif

// exp(v) for v <= 0, to 2 units in the last place, in a form that compilers turn into vector code. NaN stays NaN.
inline float exp_down(float v) {
  v = v < -87.0f ? -87.0f : v;
  float turns = v * 1.44269504f - 0.5f;
  int32_t whole = static_cast<int32_t>(turns == turns ? turns : 0.0f);
  float rest = v - whole * 0.693359375f + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  int32_t scale = (whole + 127) << 23;
  float power;
  std::memcpy(&power, &scale, 4);
  return p * power;
}
inline double exp_down(double v) { return std::exp(v); }

// Codes and weights from a row and its 1 + exp(..); the usual numbers of bits are known when compiling (else B = 0).
template <int B, class T, class A>
inline void hash_chunks(const T* x, const A* e, int64_t K, int64_t any, int scaled, int32_t* code, A* weight) {
  const int64_t bits = B ? B : any;
  for (int64_t k = 0; k < K; k++, x += bits, e += bits) {
    int32_t c = 0;
    A product = 1, length = 0;
    for (int64_t i = 0; i < bits; i++) {
      A v = load(x[i]);
      c |= static_cast<int32_t>(v >= A(0)) << i;
      product *= e[i];
      length += v < A(0) ? -v : v;
    }
    code[k] = c;
    weight[k] = (scaled ? length : A(1)) / product;
  }
}

// One row of n entries in chunks of `bits`: codes (first entry is the lowest bit) and weights.
template <class T, class A>
void hash_row(const T* x, int64_t K, int64_t bits, double steep, int scaled, int32_t* code, A* weight, A* buffer) {
  const A slope = static_cast<A>(-steep);
  const int64_t d = K * bits;
  for (int64_t i = 0; i < d; i++) {
    A v = load(x[i]);
    buffer[i] = A(1) + exp_down(slope * (v < A(0) ? -v : v));
  }
  if (bits == 8)
    hash_chunks<8>(x, buffer, K, bits, scaled, code, weight);
  else if (bits == 4)
    hash_chunks<4>(x, buffer, K, bits, scaled, code, weight);
  else
    hash_chunks<0>(x, buffer, K, bits, scaled, code, weight);
}

template <class T, class A>
void hash_rows(const T* x, int64_t n, int64_t K, int64_t bits, double steep, int scaled, int32_t* code, A* weight,
               int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<A> buffer(K * bits);
#pragma omp for
    for (int64_t t = 0; t < n; t++)
      hash_row(x + t * K * bits, K, bits, steep, scaled, code + t * K, weight + t * K, buffer.data());
  }
}

// dL/dx from dL/dweight.
template <class T>
void hash_gradient(const T* x, const T* dw, int64_t n, int64_t K, int64_t bits, double steep, int scaled, T* dx,
                   int threads) {
  const T s = static_cast<T>(steep);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<T> buffer(bits);
#pragma omp for
    for (int64_t c = 0; c < n * K; c++) {
      const T* z = x + c * bits;
      T product = 1, length = 0;
      for (int64_t i = 0; i < bits; i++) {
        T size = z[i] < 0 ? -z[i] : z[i];
        buffer[i] = exp_down(-s * size);
        product *= T(1) + buffer[i];
        length += size;
      }
      const T p = T(1) / product, w = scaled ? length * p : p;
      for (int64_t i = 0; i < bits; i++) {
        T slope = w * s * buffer[i] / (T(1) + buffer[i]) + (scaled ? p : T(0));
        dx[c * bits + i] = z[i] > 0 ? dw[c] * slope : z[i] < 0 ? -dw[c] * slope : dw[c] * z[i];
      }
    }
  }
}

bool outside(const int32_t* code, int64_t count, int64_t R) {
  uint32_t top = 0;
  for (int64_t i = 0; i < count; i++) top = std::max(top, static_cast<uint32_t>(code[i]));
  return count > 0 && top >= static_cast<uint64_t>(R);
}

// y[j] += sum over G rows: fewer passes over y than one row at a time.
template <int G, class T, class A>
inline void add_rows(const int32_t* code, const A* weight, const T* tables, int64_t R, int64_t h, A* y) {
  const T* row[G];
  A p[G];
  for (int g = 0; g < G; g++) {
    row[g] = tables + (g * R + code[g]) * h;
    p[g] = weight[g];
  }
#pragma omp simd
  for (int64_t j = 0; j < h; j++) {
    A sum = y[j];
    for (int g = 0; g < G; g++) sum += p[g] * load(row[g][j]);
    y[j] = sum;
  }
}

template <class T, class A>
void add_tables(const int32_t* code, const A* weight, const T* tables, int64_t count, int64_t R, int64_t h, A* y) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) add_rows<8>(code + k, weight + k, tables + k * R * h, R, h, y);
  for (; k + 2 <= count; k += 2) add_rows<2>(code + k, weight + k, tables + k * R * h, R, h, y);
  if (k < count) add_rows<1>(code + k, weight + k, tables + k * R * h, R, h, y);
}

template <class T, class A>
void begin(const T* bias, int64_t h, A* y) {
  for (int64_t j = 0; j < h; j++) y[j] = bias ? load(bias[j]) : A(0);
}

// Few tokens: token by token. Many: eight tables at a time, so that their rows are still in cache for the next
// tokens of the chunk.
template <class A>
void sum_whole(const int32_t* code, const A* weight, const A* tables, const A* bias, A* y, int64_t n, int64_t K,
               int64_t R, int64_t h, int threads) {
  const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(1024, (n + threads - 1) / threads));
  const int64_t chunks = (n + chunk - 1) / chunk;
  const auto sum = [=](int64_t c) {
    const int64_t first = c * chunk, last = std::min(n, first + chunk);
    for (int64_t t = first; t < last; t++) begin(bias, h, y + t * h);
    const int64_t group = last - first < 64 ? K : 8;
    for (int64_t k = 0; k < K; k += group)
      for (int64_t t = first; t < last; t++)
        add_tables(code + t * K + k, weight + t * K + k, tables + k * R * h, std::min(group, K - k), R, h, y + t * h);
  };
  if (threads == 1 || chunks == 1) {  // a team of one thread costs as much as a tenth of a token
    for (int64_t c = 0; c < chunks; c++) sum(c);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t c = 0; c < chunks; c++) sum(c);
}

// Rows of two bytes an entry are summed in float and rounded once.
template <class T>
void sum_rounded(const int32_t* code, const float* weight, const T* tables, const T* bias, T* y, int64_t n, int64_t K,
                 int64_t R, int64_t h, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && n > 1)
  {
    std::vector<float> sum(h);
#pragma omp for
    for (int64_t t = 0; t < n; t++) {
      begin(bias, h, sum.data());
      add_tables(code + t * K, weight + t * K, tables, K, R, h, sum.data());
      for (int64_t j = 0; j < h; j++) store(y + t * h + j, sum[j]);
    }
  }
}

template <class T, class A>
void sum_tokens(const int32_t* code, const A* weight, const T* tables, const T* bias, T* y, int64_t n, int64_t K,
                int64_t R, int64_t h, int threads) {
  if constexpr (sizeof(T) == 2)
    sum_rounded(code, weight, tables, bias, y, n, K, R, h, threads);
  else
    sum_whole(code, weight, tables, bias, y, n, K, R, h, threads);
}

// Gradients by table, so that no two threads write to one place. Tokens are first sorted by their row (a counting
// sort), so that each row of the gradient is written once, whole, in cache, and in an order that never changes.
template <class A>
void gradient(const int32_t* code, const A* weight, const A* tables, const A* dy, A* dtables, A* dweight,
              const int64_t* place, int64_t n, int64_t K, int64_t R, int64_t h, int threads) {
#ifdef __linux__
  if (dtables && !place) {  // a fresh block of many MB: touching it in pages of 4 KB would cost more than the sums
    uintptr_t from = (reinterpret_cast<uintptr_t>(dtables) + 4095) & ~uintptr_t(4095);
    uintptr_t to = reinterpret_cast<uintptr_t>(dtables + K * R * h) & ~uintptr_t(4095);
    if (to > from + (4u << 20)) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
  }
#endif
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<int64_t> end(R + 1), order(n);
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < K; k++) {
      std::fill(end.begin(), end.end(), 0);
      for (int64_t t = 0; t < n; t++) end[code[t * K + k] + 1]++;
      for (int64_t r = 0; r < R; r++) end[r + 1] += end[r];
      for (int64_t t = 0; t < n; t++) order[end[code[t * K + k]]++] = t;  // end[r] moves from row r's start to its end
      int64_t i = 0;
      for (int64_t r = 0; r < R; r++) {
        const int64_t stop = end[r];
        A* d = dtables ? dtables + (place ? place[k * R + r] : k * R + r) * h : nullptr;
        if (i == stop) {
          if (d && !place) std::fill(d, d + h, A(0));
          continue;
        }
        const A* row = tables + (k * R + r) * h;
        for (bool fresh = true; i < stop; fresh = false) {
          const bool pair = i + 1 < stop;
          const int64_t t = order[i], u = order[pair ? i + 1 : i];
          const A *g = dy + t * h, *e = dy + u * h;
          const A p = weight[t * K + k], q = pair ? weight[u * K + k] : A(0);
          A a = 0, b = 0;
          if (dweight) {
#pragma omp simd reduction(+ : a, b)
            for (int64_t j = 0; j < h; j++) {
              a += g[j] * row[j];
              b += e[j] * row[j];
            }
            dweight[t * K + k] = a;
            dweight[u * K + k] = b;
          }
          if (d && fresh) {
#pragma omp simd
            for (int64_t j = 0; j < h; j++) d[j] = p * g[j] + q * e[j];
          } else if (d) {
#pragma omp simd
            for (int64_t j = 0; j < h; j++) d[j] += p * g[j] + q * e[j];
          }
          i += pair ? 2 : 1;
        }
      }
    }
  }
}

// What stays the same from call to call of a layer; one pointer is cheaper to pass than nine numbers.
struct Layer {
  const void *tables, *bias;
  int64_t K, bits, h;
  double steep;
  int scaled, threads;
};

template <class T, class A>
void whole(const T* x, T* y, int64_t n, const Layer& layer) {
  static thread_local std::vector<int32_t> code;  // kept: a token takes less time than asking for memory
  static thread_local std::vector<A> weight, buffer;
  const int64_t K = layer.K, d = K * layer.bits;
  code.resize(n * K);
  weight.resize(n * K);
  buffer.resize(d);
  if (layer.threads > 1)
    hash_rows(x, n, K, layer.bits, layer.steep, layer.scaled, code.data(), weight.data(), layer.threads);
  else
    for (int64_t t = 0; t < n; t++)
      hash_row(x + t * d, K, layer.bits, layer.steep, layer.scaled, code.data() + t * K, weight.data() + t * K,
               buffer.data());
  sum_tokens(code.data(), weight.data(), static_cast<const T*>(layer.tables), static_cast<const T*>(layer.bias), y, n,
             K, int64_t(1) << layer.bits, layer.h, layer.threads);
}

}  // namespace

extern "C" {

#define FORWARD(NAME, T, A)                                                                                           \
  void hash_##NAME(const T* x, int32_t* code, A* weight, int64_t n, int64_t K, int64_t bits, double steep,            \
                   int scaled, int threads) {                                                                         \
    hash_rows(x, n, K, bits, steep, scaled, code, weight, threads);                                                   \
  }                                                                                                                   \
  int sum_##NAME(const int32_t* code, const A* weight, const T* tables, const T* bias, T* y, int64_t n, int64_t K,    \
                 int64_t R, int64_t h, int threads) {                                                                 \
    if (outside(code, n * K, R)) return 1;                                                                            \
    sum_tokens(code, weight, tables, bias, y, n, K, R, h, threads);                                                   \
    return 0;                                                                                                         \
  }                                                                                                                   \
  void whole_##NAME(const T* x, T* y, int64_t n, const Layer* layer) { whole<T, A>(x, y, n, *layer); }
#define BACKWARD(NAME, A)                                                                                             \
  void hash_gradient_##NAME(const A* x, const A* dw, A* dx, int64_t n, int64_t K, int64_t bits, double steep,         \
                            int scaled, int threads) {                                                                \
    hash_gradient(x, dw, n, K, bits, steep, scaled, dx, threads);                                                     \
  }                                                                                                                   \
  void gradient_##NAME(const int32_t* code, const A* weight, const A* tables, const A* dy, A* dtables, A* dweight,    \
                       const int64_t* place, int64_t n, int64_t K, int64_t R, int64_t h, int threads) {               \
    gradient(code, weight, tables, dy, dtables, dweight, place, n, K, R, h, threads);                                 \
  }

FORWARD(float32, float, float)
FORWARD(float64, double, double)
FORWARD(bfloat16, bf16, float)
#ifdef __FLT16_MANT_DIG__
FORWARD(float16, _Float16, float)
#endif
BACKWARD(float32, float)
BACKWARD(float64, double)
}

#ifdef MEMSPAN_PYTHON
namespace {

// whole_*(address of x, address of y, n, address of a Layer), for work of microseconds.
template <class T, class A>
PyObject* call_whole(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "takes 4 arguments, was given %zd", count);
  const T* x = static_cast<const T*>(PyLong_AsVoidPtr(given[0]));
  T* y = static_cast<T*>(PyLong_AsVoidPtr(given[1]));
  const int64_t n = PyLong_AsLongLong(given[2]);
  const Layer* layer = static_cast<const Layer*>(PyLong_AsVoidPtr(given[3]));
  if (PyErr_Occurred()) return nullptr;
  whole<T, A>(x, y, n, *layer);
  return Py_NewRef(Py_None);
}

#define METHOD(NAME, T, A) \
  {"whole_" #NAME, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_whole<T, A>)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {METHOD(float32, float, float),
                         METHOD(float64, double, double),
                         METHOD(bfloat16, bf16, float),
#ifdef __FLT16_MANT_DIG__
                         METHOD(float16, _Float16, float),
#endif
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "lookup", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_lookup() { return PyModule_Create(&module); }
#endif
