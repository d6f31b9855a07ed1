// Vectors of one instruction set: loads and stores that convert to the accumulator's type. Included by loops.h inside
// the namespace of that instruction set, where VECTOR_BYTES is its register width. Only compiler vectors and builtins
// here: an inline function of the standard library, compiled for AVX-512, could become the one that everybody links.

inline int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

typedef float FloatVector __attribute__((vector_size(VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t WordVector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfwordVector __attribute__((vector_size(VECTOR_BYTES / 2)));

template <typename T>
struct VectorOf {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = sizeof(Vector<T>) / sizeof(acc_type<T>);

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline FloatVector widen(HalfwordVector h, BFloat16) {
  return bit_cast<FloatVector>(__builtin_convertvector(h, WordVector) << 16);
}

inline HalfwordVector narrow(FloatVector v, BFloat16) {
  const WordVector x = bit_cast<WordVector>(v);
  const WordVector rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;  // to nearest, ties to even
  const WordVector quiet_nan = (x >> 16) | 0x40;
  return __builtin_convertvector((x & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded, HalfwordVector);
}

#if VECTOR_BYTES == 64
inline FloatVector widen(HalfwordVector h, Float16) {
  return bit_cast<FloatVector>(_mm512_cvtph_ps(bit_cast<__m256i>(h)));
}
inline HalfwordVector narrow(FloatVector v, Float16) {
  return bit_cast<HalfwordVector>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif VECTOR_BYTES == 32
inline FloatVector widen(HalfwordVector h, Float16) {
  return bit_cast<FloatVector>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
}
inline HalfwordVector narrow(FloatVector v, Float16) {
  return bit_cast<HalfwordVector>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
// The exponent is moved by a product with a power of two, which also does the rounding and the subnormal numbers.
inline FloatVector widen(HalfwordVector h, Float16) {
  const WordVector x = __builtin_convertvector(h, WordVector), magnitude = (x & 0x7fff) << 13;
  const WordVector finite = bit_cast<WordVector>(bit_cast<FloatVector>(magnitude) * 0x1p112f);
  return bit_cast<FloatVector>((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite) | ((x & 0x8000) << 16));
}
inline HalfwordVector narrow(FloatVector v, Float16) {
  const WordVector x = bit_cast<WordVector>(v), magnitude = x & 0x7fffffff, sign = (x >> 16) & 0x8000;
  // Normal results: rebias the exponent by -112, round the 13 lost bits to nearest even; overflow lands on infinity.
  const WordVector normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 puts the unit in the last place at 2^-24, so that the sum rounds there.
  const WordVector tiny = bit_cast<WordVector>(bit_cast<FloatVector>(magnitude) + 0.5f) - 0x3f000000;
  const WordVector finite = magnitude < (113u << 23) ? tiny : normal;
  const WordVector special = magnitude > 0x7f800000 ? WordVector{} + 0x7e00 : WordVector{} + 0x7c00;
  return __builtin_convertvector((magnitude >= (143u << 23) ? special : finite) | sign, HalfwordVector);
}
#endif

inline FloatVector load(const float* p) {
  FloatVector v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline DoubleVector load(const double* p) {
  DoubleVector v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T>
inline FloatVector load(const T* p) {
  HalfwordVector h;
  __builtin_memcpy(&h, p, sizeof(h));
  return widen(h, T());
}

inline void store(float* p, FloatVector v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
inline void store(double* p, DoubleVector v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <typename T>
inline void store(T* p, FloatVector v) {
  const HalfwordVector h = narrow(v, T());
  __builtin_memcpy(p, &h, sizeof(h));
}

// The first n lanes, the others zero; n may be anything, and out of [0, lanes] it is clamped.
template <typename T>
inline Vector<T> load_first(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load(p);
  T buffer[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <typename T>
inline void store_first(T* p, Vector<T> v, int64_t n) {
  if (n >= kLanes<T>) return store(p, v);
  T buffer[kLanes<T>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// In double, whatever the lanes are: long sums end here.
template <typename V>
inline double sum_lanes(V v) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}
