// The launcher loads cubins and launches kernels through the CUDA driver API, and nothing else.
//
// It needs no torch, Python, TileLang or CUDA header. The driver is opened at run time, and the
// used part of the driver's interface, which never changes, is declared here. Any C compiler
// compiles this file. mhc_ops/native/launcher.py builds and calls the launcher, and host.cpp gets
// the address of mhc_launch.

#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

// ----------------------------------------------------------------- the used part of the driver API

typedef int CUresult;
typedef int CUdevice;
typedef struct CUctx_st* CUcontext;
typedef struct CUmod_st* CUmodule;
typedef struct CUfunc_st* CUfunction;
typedef struct CUstream_st* CUstream;

enum {
  CUDA_SUCCESS = 0,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14,
  CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4,
  CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
  CU_STREAM_CAPTURE_STATUS_ACTIVE = 1,
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
};

typedef union {
  char pad[64];
  struct {
    unsigned x, y, z;
  } cluster;
  int programmatic;
} CUlaunchAttributeValue;

typedef struct {
  int id;
  char pad[4];
  CUlaunchAttributeValue value;
} CUlaunchAttribute;

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  CUstream stream;
  CUlaunchAttribute* attributes;
  unsigned attribute_count;
} CUlaunchConfig;

_Static_assert(sizeof(CUlaunchAttribute) == 72, "layout of the driver API");
_Static_assert(sizeof(void*) != 8 || sizeof(CUlaunchConfig) == 56, "layout of the driver API");

// Portable clusters have at most 8 CTAs.
enum { PORTABLE_CLUSTER = 8 };

// ------------------------------------------------------------------------------------- the interface

// mhc_open, mhc_load and mhc_launch return a result of the driver (0 is success), or one of these.
enum { MHC_NO_DRIVER = -1, MHC_OLD_DRIVER = -2, MHC_NO_MEMORY = -3 };

// A kernel is loaded on a device, and stays loaded as long as the process lives.
typedef struct {
  CUfunction function;
  CUcontext context;  // this is the primary context of the device
  unsigned block, cluster, shared;
  int pdl;
  char name[];  // messages show this name
} mhc_kernel;

#define MHC_EXPORT __attribute__((visibility("default")))

static struct {
  CUresult (*init)(unsigned);
  CUresult (*device)(CUdevice*, int);
  CUresult (*attribute)(int*, int, CUdevice);
  CUresult (*retain)(CUcontext*, CUdevice);
  CUresult (*current)(CUcontext*);
  CUresult (*push)(CUcontext);
  CUresult (*pop)(CUcontext*);
  CUresult (*load)(CUmodule*, const void*);
  CUresult (*unload)(CUmodule);
  CUresult (*get)(CUfunction*, CUmodule, const char*);
  CUresult (*set)(CUfunction, int, int);
  CUresult (*launch)(const CUlaunchConfig*, CUfunction, void**, void**);
  CUresult (*capture)(CUstream, int*, uint64_t*, void**, const void**, size_t*);
  CUresult (*error_name)(CUresult, const char**);
  CUresult (*error_text)(CUresult, const char**);
  CUresult (*load_now)(CUfunction);  // drivers older than CUDA 12.4 lack this function
} driver;

static int opened = 0;  // the lock guards this; once it is set, the table above does not change
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int find_all(void* library) {
  const struct {
    void* place;
    const char* name;
    int needed;
  } symbols[] = {
      {&driver.init, "cuInit", 1},
      {&driver.device, "cuDeviceGet", 1},
      {&driver.attribute, "cuDeviceGetAttribute", 1},
      {&driver.retain, "cuDevicePrimaryCtxRetain", 1},
      {&driver.current, "cuCtxGetCurrent", 1},
      {&driver.push, "cuCtxPushCurrent_v2", 1},
      {&driver.pop, "cuCtxPopCurrent_v2", 1},
      {&driver.load, "cuModuleLoadData", 1},
      {&driver.unload, "cuModuleUnload", 1},
      {&driver.get, "cuModuleGetFunction", 1},
      {&driver.set, "cuFuncSetAttribute", 1},
      {&driver.launch, "cuLaunchKernelEx", 1},
      {&driver.capture, "cuStreamGetCaptureInfo_v2", 1},
      {&driver.error_name, "cuGetErrorName", 1},
      {&driver.error_text, "cuGetErrorString", 1},
      {&driver.load_now, "cuFuncLoad", 0},
  };
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; ++i) {
    void* const symbol = dlsym(library, symbols[i].name);
    if (symbol == NULL && symbols[i].needed) {
      return MHC_OLD_DRIVER;
    }
    *(void**)symbols[i].place = symbol;
  }
  return CUDA_SUCCESS;
}

// Opens the driver at this path. Any number of threads may call this function, and a failure is
// not remembered.
MHC_EXPORT int mhc_open(const char* path) {
  int result = CUDA_SUCCESS;
  pthread_mutex_lock(&lock);
  if (!opened) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    result = library == NULL ? MHC_NO_DRIVER : find_all(library);
    if (result == CUDA_SUCCESS) {
      result = driver.init(0);
    }
    opened = result == CUDA_SUCCESS;
  }
  pthread_mutex_unlock(&lock);
  return result;
}

// Tells the major and minor compute capability and the multiprocessors of a device. mhc_open must
// have succeeded before.
MHC_EXPORT int mhc_describe(int device, int facts[3]) {
  static const int attributes[] = {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                                   CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                                   CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT};
  CUdevice handle;
  CUresult result = driver.device(&handle, device);
  for (int i = 0; i < 3 && result == CUDA_SUCCESS; ++i) {
    result = driver.attribute(&facts[i], attributes[i], handle);
  }
  return result;
}

static CUresult load(const void* cubin, const char* symbol, mhc_kernel* kernel) {
  CUmodule module;
  CUresult result = driver.load(&module, cubin);
  if (result != CUDA_SUCCESS) {
    return result;
  }
  result = driver.get(&kernel->function, module, symbol);
  if (result == CUDA_SUCCESS && kernel->shared > 0) {
    result = driver.set(kernel->function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                        (int)kernel->shared);
  }
  if (result == CUDA_SUCCESS && kernel->cluster > PORTABLE_CLUSTER) {
    result = driver.set(kernel->function, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1);
  }
  // The driver may put off loading until the first launch. A launch in a capture cannot load a
  // kernel, so the kernel is loaded now.
  if (result == CUDA_SUCCESS && driver.load_now != NULL) {
    result = driver.load_now(kernel->function);
  }
  if (result != CUDA_SUCCESS) {
    driver.unload(module);
  }
  return result;
}

// Loads one kernel in the primary context of a device. mhc_open must have succeeded before.
MHC_EXPORT int mhc_load(int device, const void* cubin, const char* symbol, const char* name,
                        unsigned block, unsigned cluster, unsigned shared, int pdl,
                        mhc_kernel** loaded) {
  const int length = snprintf(NULL, 0, "%s", name);
  mhc_kernel* const kernel = malloc(sizeof *kernel + (size_t)length + 1);
  if (kernel == NULL) {
    return MHC_NO_MEMORY;
  }
  snprintf(kernel->name, (size_t)length + 1, "%s", name);
  kernel->block = block;
  kernel->cluster = cluster;
  kernel->shared = shared;
  kernel->pdl = pdl;
  CUdevice handle;
  CUcontext popped;
  CUresult result = driver.device(&handle, device);
  if (result == CUDA_SUCCESS) {
    result = driver.retain(&kernel->context, handle);
  }
  if (result == CUDA_SUCCESS) {
    result = driver.push(kernel->context);
  }
  if (result == CUDA_SUCCESS) {
    result = load(cubin, symbol, kernel);
    driver.pop(&popped);
  }
  if (result != CUDA_SUCCESS) {
    free(kernel);
    return result;
  }
  *loaded = kernel;
  return CUDA_SUCCESS;
}

// Launches a kernel on a stream of the kernel's device. The arguments have the order of the
// kernel's signature.
MHC_EXPORT int mhc_launch(const mhc_kernel* kernel, unsigned grid_x, unsigned grid_y, void* stream,
                          void** arguments) {
  CUlaunchAttribute attributes[2];
  unsigned count = 0;
  if (kernel->cluster > 1) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attributes[count].value.cluster.x = kernel->cluster;
    attributes[count].value.cluster.y = attributes[count].value.cluster.z = 1;
    ++count;
  }
  if (kernel->pdl) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attributes[count].value.programmatic = 1;
    ++count;
  }
  const CUlaunchConfig config = {
      .grid_x = grid_x,
      .grid_y = grid_y,
      .grid_z = 1,
      .block_x = kernel->block,
      .block_y = 1,
      .block_z = 1,
      .shared_bytes = kernel->shared,
      .stream = (CUstream)stream,
      .attributes = attributes,
      .attribute_count = count,
  };
  // A thread that has not used the device yet has no context, or another device's.
  CUcontext current = NULL;
  CUresult result = driver.current(&current);
  if (result != CUDA_SUCCESS) {
    return result;
  }
  if (current == kernel->context) {
    return driver.launch(&config, kernel->function, arguments, NULL);
  }
  result = driver.push(kernel->context);
  if (result == CUDA_SUCCESS) {
    result = driver.launch(&config, kernel->function, arguments, NULL);
    driver.pop(&current);
  }
  return result;
}

// Returns the number of the capture that a stream is in, or 0. The stream belongs to the kernel's
// device, or without a kernel to the current device.
MHC_EXPORT uint64_t mhc_capture(const mhc_kernel* kernel, void* stream) {
  int status = 0;
  uint64_t number = 0;
  CUcontext popped;
  if (kernel != NULL && driver.push(kernel->context) != CUDA_SUCCESS) {
    return 0;
  }
  const CUresult result = driver.capture((CUstream)stream, &status, &number, NULL, NULL, NULL);
  if (kernel != NULL) {
    driver.pop(&popped);
  }
  return result == CUDA_SUCCESS && status == CU_STREAM_CAPTURE_STATUS_ACTIVE ? number : 0;
}

// Says in words what a result means.
MHC_EXPORT void mhc_explain(int result, char* text, size_t size) {
  const char* name = NULL;
  const char* said = NULL;
  switch (result) {
    case MHC_NO_DRIVER:
      snprintf(text, size, "there is no CUDA driver (libcuda.so.1)");
      return;
    case MHC_OLD_DRIVER:
      snprintf(text, size, "the CUDA driver is older than CUDA 12");
      return;
    case MHC_NO_MEMORY:
      snprintf(text, size, "there is no memory left");
      return;
    default:
      break;
  }
  pthread_mutex_lock(&lock);  // another thread may be filling the table of the driver's functions
  const int known = driver.error_name != NULL && driver.error_text != NULL &&
                    driver.error_name(result, &name) == CUDA_SUCCESS &&
                    driver.error_text(result, &said) == CUDA_SUCCESS;
  pthread_mutex_unlock(&lock);
  if (known) {
    snprintf(text, size, "%s: %s", name, said);
  } else {
    snprintf(text, size, "error %d of the CUDA driver", result);
  }
}

// Says in words which launch failed, and why.
MHC_EXPORT void mhc_explain_launch(const mhc_kernel* kernel, unsigned grid_x, unsigned grid_y,
                                   int result, char* text, size_t size) {
  char reason[256];
  mhc_explain(result, reason, sizeof reason);
  snprintf(text, size,
           "%s cannot be launched (grid %u x %u, block %u, clusters of %u, %u bytes of shared "
           "memory, programmatic launch %s): %s",
           kernel->name, grid_x, grid_y, kernel->block, kernel->cluster, kernel->shared,
           kernel->pdl ? "on" : "off", reason);
}
