// What Python calls of an op: the sizes of its contract, and its launcher.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

#include "backend.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

static std::string message;
EXPORT const char* entry_error() { return message.c_str(); }

// 0, or 1 and a message.
#define CUDA_ON_CPU_ENTRY(name, Args)                                                                             \
  EXPORT int64_t name##_size() { return sizeof(fastnorm::Args); }                                                 \
  EXPORT int64_t name##_workspace(const fastnorm::Args* args) { return fastnorm::cuda::name##_workspace(*args); } \
  EXPORT int name##_run(const fastnorm::Args* args, void* workspace) {                                            \
    try {                                                                                                         \
      fastnorm::cuda::name(*args, fastnorm::cuda::Queue{nullptr, workspace});                                     \
      return 0;                                                                                                   \
    } catch (const std::exception& e) {                                                                           \
      message = e.what();                                                                                         \
      return 1;                                                                                                   \
    }                                                                                                             \
  }

// Forces the choices of plan.h; -1 and 0 leave them alone.
#define CUDA_ON_CPU_PLAN                                           \
  EXPORT void force_plan(int resident, int cluster, int scalar) {  \
    fastnorm::cuda::plan_override() = {resident, cluster, scalar}; \
  }
