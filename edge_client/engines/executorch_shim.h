// What a program holds while it runs, as its kernels see it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <sys/mman.h>

#include <executorch/runtime/kernel/operator_registry.h>

struct pthreadpool;
struct xnn_operator;

// Pages that exist once they are written, so what is planned for the largest batch costs a small one nothing.
struct Pages {
  uint8_t* data = nullptr;
  size_t size = 0;

  Pages() = default;
  Pages(const Pages&) = delete;
  ~Pages() { grow(0); }

  bool grow(size_t bytes) {  // without what was in them
    if (data) munmap(data, size);
    void* got = bytes ? mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : nullptr;
    data = got == MAP_FAILED ? nullptr : static_cast<uint8_t*>(got);
    size = data ? bytes : 0;
    return size == bytes;
  }
};

struct Workshop {
  pthreadpool* pool = nullptr;
  xnn_operator* products[4] = {};
  Pages scratch[3];
};

extern thread_local Workshop* lamina_current;  // of the program that runs on this thread

executorch::runtime::Span<const executorch::runtime::Kernel> lamina_kernels();
