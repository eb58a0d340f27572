// The kernels that `export/executorch_ops.py` names: float32, contiguous, one pass where one is enough.
//
// Products are XNNPACK's, by its operator interface; the rest is written so that a compiler makes vectors of
// it. Sums that need precision are kept per lane, so no order of addition depends on the threads.

#include "executorch_shim.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>

extern "C" {  // of XNNPACK and its thread pool, which the wheel has no headers of
struct xnn_operator;
int xnn_run_operator(xnn_operator*, pthreadpool*);
int xnn_create_dynamic_fully_connected_nc_f32(float, float, uint32_t flags, xnn_operator**);
int xnn_reshape_dynamic_fully_connected_nc_f32(
    xnn_operator*, size_t rows, size_t in, size_t out, size_t in_stride, size_t out_stride, size_t* workspace, pthreadpool*);
int xnn_setup_dynamic_fully_connected_nc_f32(
    xnn_operator*, void* workspace, const float* input, const float* kernel, const float* bias, float* output);
int xnn_create_batch_matrix_multiply_nc_f32(uint32_t flags, xnn_operator**);
int xnn_reshape_batch_matrix_multiply_nc_f32(
    xnn_operator*, size_t dims, const size_t* a, const size_t* b, size_t m, size_t k, size_t n, size_t* workspace, pthreadpool*);
int xnn_setup_batch_matrix_multiply_nc_f32(xnn_operator*, void* workspace, const float* a, const float* b, float* c);
int xnn_run_transpose_nd_x32(
    const void* input, void* output, size_t dims, const size_t* shape, const size_t* order, uint32_t flags, pthreadpool*);
void pthreadpool_parallelize_1d_tile_1d(
    pthreadpool*, void (*)(void*, size_t, size_t), void*, size_t range, size_t tile, uint32_t flags);
}

namespace {

using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;
using Args = Span<EValue*>;

constexpr uint32_t kTransposeB = 1;  // XNN_FLAG_TRANSPOSE_WEIGHTS, of [K, N]; a product of groups means [N, K] by it
constexpr uint32_t kDenormalsOff = 1;  // PTHREADPOOL_FLAG_DISABLE_DENORMALS
constexpr size_t kRoom = 64;  // XNNPACK reads up to 16 bytes past an end
constexpr size_t kRows = 1024, kCopy = 1 << 19;  // values
constexpr size_t kWork = 16384;  // values that are worth a thread

const float* in(Args args, size_t i) { return args[i]->toTensor().const_data_ptr<float>(); }

float* out(Args args, size_t i, Span<const int32_t> sizes) {
  Tensor tensor = args[i]->toTensor();
  auto status = executorch::runtime::resize_tensor(tensor, {sizes.data(), sizes.size()});
  if (status != Error::Ok) throw status;
  return tensor.mutable_data_ptr<float>();
}

float* out_like(Args args, size_t i, size_t like) {
  auto sizes = args[like]->toTensor().sizes();
  return out(args, i, {sizes.data(), sizes.size()});
}

size_t last(Args args, size_t i) { return args[i]->toTensor().size(args[i]->toTensor().dim() - 1); }
size_t rows(Args args, size_t i) { return args[i]->toTensor().numel() / last(args, i); }

// Calls body(first, end) on pieces of [0, count), each worth `cost` values an item.
template <class Body>
void parallel(size_t count, size_t cost, const Body& body) {
  auto call = [](void* context, size_t first, size_t size) { (*static_cast<const Body*>(context))(first, first + size); };
  size_t tile = std::max<size_t>(1, kWork / std::max<size_t>(cost, 1));
  pthreadpool_parallelize_1d_tile_1d(
      lamina_current->pool, call, const_cast<Body*>(&body), count, tile, kDenormalsOff);
}

void* scratch(size_t place, size_t bytes) {
  auto& memory = lamina_current->scratch[place];
  if (memory.size < bytes && !memory.grow(bytes)) throw Error::MemoryAllocationFailed;
  return memory.data;
}

inline float exp_(float x) {  // to 2 ulp; a loop of it becomes vectors
  x = std::min(std::max(x, -87.0f), 88.0f);
  float n = std::nearbyint(x * 1.44269504f);
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return y * scale;
}

// The normal distribution up to x (Abramowitz and Stegun 7.1.26, to 1e-7), and exp(-x^2 / 2).
inline float normal(float x, float& bell) {
  bell = exp_(-0.5f * x * x);
  float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(x));
  float tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  tail *= 0.5f * bell;
  return x < 0 ? tail : 1.0f - tail;
}

void check(int status) {
  if (status != 0) throw Error::Internal;
}

void transpose(const float* x, float* y, size_t dims, const size_t* shape, const size_t* order) {
  check(xnn_run_transpose_nd_x32(x, y, dims, shape, order, 0, lamina_current->pool));
}

// c = a b + bias, one product or one for each of several groups.
void product(size_t dims, size_t groups, size_t m, size_t k, size_t n, bool flip_b, const float* a, const float* b,
             const float* bias, float* c) {
  pthreadpool* pool = lamina_current->pool;
  xnn_operator*& op = lamina_current->products[2 * (dims == 3) + flip_b];
  size_t bytes = 0;
  if (dims == 2) {
    if (!op) check(xnn_create_dynamic_fully_connected_nc_f32(-INFINITY, INFINITY, flip_b ? 0 : kTransposeB, &op));
    check(xnn_reshape_dynamic_fully_connected_nc_f32(op, m, k, n, k, n, &bytes, pool));
    check(xnn_setup_dynamic_fully_connected_nc_f32(op, scratch(1, bytes + kRoom), a, b, bias, c));
  } else {
    if (!op) check(xnn_create_batch_matrix_multiply_nc_f32(flip_b ? kTransposeB : 0, &op));
    check(xnn_reshape_batch_matrix_multiply_nc_f32(op, 1, &groups, &groups, m, k, n, &bytes, pool));
    check(xnn_setup_batch_matrix_multiply_nc_f32(op, scratch(1, bytes + kRoom), a, b, c));
  }
  check(xnn_run_operator(op, pool));
}

// a, b, bias, transpose_a, transpose_b, out
void matmul(Args args) {
  const Tensor a = args[0]->toTensor(), b = args[1]->toTensor();
  const float *left = in(args, 0), *right = in(args, 1), *bias = args[2]->isNone() ? nullptr : in(args, 2);
  const bool flip_a = args[3]->toBool(), flip_b = args[4]->toBool();
  const size_t dims = a.dim(), groups = dims == 3 ? a.size(0) : 1;
  const size_t m = a.size(dims - (flip_a ? 1 : 2)), k = a.size(dims - (flip_a ? 2 : 1));
  const size_t n = b.size(flip_b ? dims - 2 : dims - 1);
  const int32_t sizes[] = {static_cast<int32_t>(groups), static_cast<int32_t>(m), static_cast<int32_t>(n)};
  float* c = out(args, 5, {sizes + 3 - dims, dims});
  if (dims == 3) {  // some groups at a time, for it takes copies of operands
    const size_t most = std::max<size_t>(1, kCopy / (k * std::max(m, n)));
    for (size_t first = 0; first < groups; first += most) {
      const size_t some = std::min(most, groups - first), shape[] = {some, k, m}, order[] = {0, 2, 1};
      const float* a_some = left + first * m * k;
      if (flip_a) {
        float* flipped = static_cast<float*>(scratch(0, some * m * k * 4 + kRoom));
        transpose(a_some, flipped, 3, shape, order);
        a_some = flipped;
      }
      product(dims, some, m, k, n, flip_b, a_some, right + first * k * n, nullptr, c + first * m * n);
    }
    return;
  }
  if (!flip_a) return product(dims, 1, m, k, n, flip_b, left, right, bias, c);
  // A weight's gradient sums over all rows of a batch: some rows at a time, again for the copies.
  const size_t most = flip_b || bias ? k : kRows;
  for (size_t first = 0; first < k; first += most) {
    const size_t some = std::min(most, k - first), shape[] = {some, m}, order[] = {1, 0};
    float* flipped = static_cast<float*>(scratch(0, some * m * 4 + kRoom));
    float* part = first ? static_cast<float*>(scratch(2, m * n * 4)) : c;
    transpose(left + first * m, flipped, 2, shape, order);
    product(dims, 1, m, some, n, flip_b, flipped, right + first * n, bias, part);
    if (first) parallel(m * n, 1, [=](size_t i, size_t end) { for (; i < end; i++) c[i] += part[i]; });
  }
}

// x, order, out
void permute(Args args) {
  const Tensor x = args[0]->toTensor();
  auto axes = args[1]->toIntList();
  size_t shape[8], order[8];
  int32_t sizes[8];
  for (ssize_t i = 0; i < x.dim(); i++) {
    shape[i] = x.size(i), order[i] = axes[i];
    sizes[i] = x.size(axes[i]);
  }
  transpose(in(args, 0), out(args, 2, {sizes, static_cast<size_t>(x.dim())}), x.dim(), shape, order);
}

// x, out
void softmax(Args args) {
  const size_t n = last(args, 0);
  const float* x = in(args, 0);
  float* y = out_like(args, 1, 0);
  parallel(rows(args, 0), n, [=](size_t first, size_t end) {
    for (size_t row = first; row < end; row++) {
      const float* from = x + row * n;
      float *to = y + row * n, most = -INFINITY, sum = 0;
      for (size_t i = 0; i < n; i++) most = std::max(most, from[i]);
      for (size_t i = 0; i < n; i++) to[i] = exp_(from[i] - most);
      for (size_t i = 0; i < n; i++) sum += to[i];
      for (size_t i = 0; i < n; i++) to[i] *= 1 / sum;
    }
  });
}

// gradient, y, out
void softmax_backward(Args args) {
  const size_t n = last(args, 0);
  const float *g = in(args, 0), *y = in(args, 1);
  float* dx = out_like(args, 2, 0);
  parallel(rows(args, 0), n, [=](size_t first, size_t end) {
    for (size_t at = first * n; at < end * n; at += n) {
      float sum = 0;
      for (size_t i = at; i < at + n; i++) sum += g[i] * y[i];
      for (size_t i = at; i < at + n; i++) dx[i] = y[i] * (g[i] - sum);
    }
  });
}

// x, out
void gelu(Args args) {
  const float* x = in(args, 0);
  float* y = out_like(args, 1, 0);
  parallel(args[0]->toTensor().numel(), 4, [=](size_t first, size_t end) {
    float bell;
    for (size_t i = first; i < end; i++) y[i] = x[i] * normal(x[i], bell);
  });
}

// gradient, x, out
void gelu_backward(Args args) {
  const float *g = in(args, 0), *x = in(args, 1);
  float* dx = out_like(args, 2, 0);
  parallel(args[0]->toTensor().numel(), 4, [=](size_t first, size_t end) {
    for (size_t i = first; i < end; i++) {
      float bell, below = normal(x[i], bell);
      dx[i] = g[i] * (below + x[i] * bell * 0.39894228f);
    }
  });
}

// gradient, x, mean, rstd, weight, out
void layer_norm_backward(Args args) {
  const size_t n = last(args, 0);
  const float *g = in(args, 0), *x = in(args, 1), *mean = in(args, 2), *rstd = in(args, 3), *weight = in(args, 4);
  float* dx = out_like(args, 5, 0);
  parallel(rows(args, 0), n, [=](size_t first, size_t end) {
    for (size_t row = first; row < end; row++) {
      const float *gr = g + row * n, *xr = x + row * n, m = mean[row], r = rstd[row];
      float sum = 0, dot = 0;
      for (size_t i = 0; i < n; i++) sum += gr[i] * weight[i], dot += gr[i] * weight[i] * (xr[i] - m);
      sum /= n, dot *= r * r / n;
      for (size_t i = 0; i < n; i++) dx[row * n + i] = r * (gr[i] * weight[i] - sum - (xr[i] - m) * dot);
    }
  });
}

// Adds value(row, column) over the rows, for each column: blocks of columns go to the threads.
template <class Value>
void sum_columns(size_t count, size_t n, float* total, const Value& value) {
  parallel((n + 63) / 64, kWork, [=](size_t first, size_t end) {
    for (size_t block = first; block < end; block++) {
      float sum[64] = {};
      const size_t from = block * 64, width = std::min<size_t>(64, n - from);
      for (size_t row = 0; row < count; row++)
        for (size_t i = 0; i < width; i++) sum[i] += value(row, from + i);
      std::copy(sum, sum + width, total + from);
    }
  });
}

// gradient, x, mean, rstd, out0, out1
void layer_norm_backward_weights(Args args) {
  const size_t n = last(args, 0), count = rows(args, 0);
  const float *g = in(args, 0), *x = in(args, 1), *mean = in(args, 2), *rstd = in(args, 3);
  const int32_t size = n;
  sum_columns(count, n, out(args, 4, {&size, 1}), [=](size_t row, size_t i) {
    return g[row * n + i] * (x[row * n + i] - mean[row]) * rstd[row];
  });
  sum_columns(count, n, out(args, 5, {&size, 1}), [=](size_t row, size_t i) { return g[row * n + i]; });
}

// x, out
void sum_rows(Args args) {
  const size_t n = last(args, 0);
  const float* x = in(args, 0);
  const int32_t size = n;
  sum_columns(rows(args, 0), n, out(args, 1, {&size, 1}), [=](size_t row, size_t i) { return x[row * n + i]; });
}

// gradient, index, rows, out
void embedding_backward(Args args) {
  const size_t n = last(args, 0), count = rows(args, 0);
  const int64_t *index = args[1]->toTensor().const_data_ptr<int64_t>(), limit = args[2]->toInt();
  const int32_t sizes[] = {static_cast<int32_t>(limit), static_cast<int32_t>(n)};
  const float* g = in(args, 0);
  float* total = out(args, 3, {sizes, 2});
  std::fill(total, total + limit * n, 0.0f);
  for (size_t row = 0; row < count; row++) {
    if (index[row] < 0 || index[row] >= limit) throw Error::InvalidArgument;
    for (size_t i = 0; i < n; i++) total[index[row] * n + i] += g[row * n + i];
  }
}

// Images [B, C, H, W] and the patches under a kernel's places [B, places, C * kernel]; calls body(image, patch)
// with where one value lies in each. `channels` and what follows are arguments number `at` and on.
struct Patches {
  ssize_t channels, height, width, down, across, step_y, step_x, pad_y, pad_x, places_y, places_x;

  Patches(ssize_t c, ssize_t h, ssize_t w, Args args, size_t at)
      : channels(c), height(h), width(w),
        down(args[at]->toIntList()[0]), across(args[at]->toIntList()[1]),
        step_y(args[at + 1]->toIntList()[0]), step_x(args[at + 1]->toIntList()[1]),
        pad_y(args[at + 2]->toIntList()[0]), pad_x(args[at + 2]->toIntList()[1]),
        places_y((h + 2 * pad_y - down) / step_y + 1), places_x((w + 2 * pad_x - across) / step_x + 1) {}

  ssize_t image() const { return channels * height * width; }
  ssize_t patch() const { return channels * down * across; }
  ssize_t patches() const { return places_y * places_x * patch(); }

  template <class Body>
  void each(const Body& body) const {
    ssize_t to = 0;
    for (ssize_t y = 0; y < places_y; y++)
      for (ssize_t x = 0; x < places_x; x++)
        for (ssize_t c = 0; c < channels; c++)
          for (ssize_t i = y * step_y - pad_y; i < y * step_y - pad_y + down; i++)
            for (ssize_t j = x * step_x - pad_x; j < x * step_x - pad_x + across; j++)
              body(i < 0 || i >= height || j < 0 || j >= width ? -1 : (c * height + i) * width + j, to++);
  }
};

// x, kernel, stride, padding, out
void unfold(Args args) {
  const Tensor x = args[0]->toTensor();
  const Patches all(x.size(1), x.size(2), x.size(3), args, 1);
  const int32_t sizes[] = {
      static_cast<int32_t>(x.size(0)), static_cast<int32_t>(all.places_y * all.places_x), static_cast<int32_t>(all.patch())};
  const float* from = in(args, 0);
  float* to = out(args, 4, {sizes, 3});
  parallel(x.size(0), all.patches(), [=](size_t first, size_t end) {
    for (size_t b = first; b < end; b++) {
      const float* image = from + b * all.image();
      float* patches = to + b * all.patches();
      all.each([=](ssize_t i, ssize_t p) { patches[p] = i < 0 ? 0 : image[i]; });
    }
  });
}

// patches, size, kernel, stride, padding, out
void fold(Args args) {
  const Tensor x = args[0]->toTensor();
  auto size = args[1]->toIntList();
  const Patches all(size[0], size[1], size[2], args, 2);
  const int32_t sizes[] = {
      static_cast<int32_t>(x.size(0)), static_cast<int32_t>(size[0]), static_cast<int32_t>(size[1]), static_cast<int32_t>(size[2])};
  const float* from = in(args, 0);
  float* to = out(args, 5, {sizes, 4});
  parallel(x.size(0), all.patches(), [=](size_t first, size_t end) {
    std::fill(to + first * all.image(), to + end * all.image(), 0.0f);
    for (size_t b = first; b < end; b++) {
      const float* patches = from + b * all.patches();
      float* image = to + b * all.image();
      all.each([=](ssize_t i, ssize_t p) { if (i >= 0) image[i] += patches[p]; });
    }
  });
}

// p, m, v, gradient, step, learning_rate, beta1, beta2, eps, weight_decay, out0, out1, out2
void adamw(Args args) {
  const float *p = in(args, 0), *m = in(args, 1), *v = in(args, 2), *g = in(args, 3);
  const double step = *in(args, 4), rate = *in(args, 5), beta1 = args[6]->toDouble(), beta2 = args[7]->toDouble();
  const float b1 = beta1, b2 = beta2, c1 = 1 - beta1, c2 = 1 - beta2, eps = args[8]->toDouble();
  const float size = rate / (1 - std::pow(beta1, step)), keep = 1 - rate * args[9]->toDouble();
  const float root = 1 / std::sqrt(1 - std::pow(beta2, step));
  float *new_p = out_like(args, 10, 0), *new_m = out_like(args, 11, 0), *new_v = out_like(args, 12, 0);
  parallel(args[0]->toTensor().numel(), 4, [=](size_t first, size_t end) {
    for (size_t i = first; i < end; i++) {
      const float mi = b1 * m[i] + c1 * g[i], vi = b2 * v[i] + c2 * g[i] * g[i];
      new_p[i] = keep * p[i] - size * mi / (std::sqrt(vi) * root + eps);
      new_m[i] = mi, new_v[i] = vi;
    }
  });
}

// What a kernel throws stays in this library.
template <void (*kernel)(Args)>
void guarded(KernelRuntimeContext& context, Args args) {
  try {
    kernel(args);
  } catch (Error status) {
    context.fail(status);
  }
}

const Kernel kKernels[] = {
    Kernel("lamina::matmul.out", guarded<matmul>),
    Kernel("lamina::permute.out", guarded<permute>),
    Kernel("lamina::softmax.out", guarded<softmax>),
    Kernel("lamina::softmax_backward.out", guarded<softmax_backward>),
    Kernel("lamina::gelu.out", guarded<gelu>),
    Kernel("lamina::gelu_backward.out", guarded<gelu_backward>),
    Kernel("lamina::layer_norm_backward.out", guarded<layer_norm_backward>),
    Kernel("lamina::layer_norm_backward_weights.out", guarded<layer_norm_backward_weights>),
    Kernel("lamina::sum_rows.out", guarded<sum_rows>),
    Kernel("lamina::embedding_backward.out", guarded<embedding_backward>),
    Kernel("lamina::unfold.out", guarded<unfold>),
    Kernel("lamina::fold.out", guarded<fold>),
    Kernel("lamina::adamw.out", guarded<adamw>),
};

}  // namespace

executorch::runtime::Span<const executorch::runtime::Kernel> lamina_kernels() {
  return {kKernels, sizeof kKernels / sizeof *kKernels};
}
