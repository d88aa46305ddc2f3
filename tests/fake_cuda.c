// This CUDA driver has no GPU: it keeps what it is asked, and a launch calls back into the test.
//
// A cubin is a text here, the name of its one kernel; a text that starts with '!' is refused.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  NO_DEVICE = 100,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NOT_FOUND = 500,
  LAUNCH_OUT_OF_RESOURCES = 701,
};

enum { DEVICES = 2 };

typedef struct {
  int device;
} Context;

typedef struct {
  Context* context;
  char text[128];
} Module;

typedef struct {
  Module* module;
  int shared, non_portable, loaded;
} Function;

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  struct {
    int id;
    char pad[4];
    union {
      char pad[64];
      unsigned cluster[3];
      int programmatic;
    } value;
  }* attributes;
  unsigned attribute_count;
} Config;

// The callback tells the test of a launch; the test returns the result of the launch.
typedef int (*Callback)(const char* kernel, int device, unsigned grid_x, unsigned grid_y,
                        unsigned block, unsigned cluster, unsigned shared, int pdl, void* stream,
                        void** arguments);

static Callback callback;
static Context contexts[DEVICES] = {{0}, {1}};
static uint64_t capture;
static int facts[] = {9, 0, 132};
static int loads, unloads;
static _Thread_local Context* stack[8];
static _Thread_local int depth;

void fake_callback(Callback given) { callback = given; }
void fake_capture(uint64_t number) { capture = number; }
void fake_device(int major, int minor, int multiprocessors) {
  facts[0] = major;
  facts[1] = minor;
  facts[2] = multiprocessors;
}
int fake_loads(void) { return __atomic_load_n(&loads, __ATOMIC_SEQ_CST); }
int fake_unloads(void) { return __atomic_load_n(&unloads, __ATOMIC_SEQ_CST); }
int fake_depth(void) { return depth; }

CUresult cuInit(unsigned flags) { return flags == 0 ? SUCCESS : INVALID_VALUE; }

CUresult cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < DEVICES ? SUCCESS : NO_DEVICE;
}

// Attributes have the CUDA driver's numbers: these are the compute capability and multiprocessors,
// an H200's unless told otherwise.
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 75: *value = facts[0]; return SUCCESS;
    case 76: *value = facts[1]; return SUCCESS;
    case 16: *value = facts[2]; return SUCCESS;
    default: return INVALID_VALUE;
  }
}

CUresult cuDevicePrimaryCtxRetain(Context** context, int device) {
  *context = &contexts[device];
  return SUCCESS;
}

CUresult cuCtxGetCurrent(Context** context) {
  *context = depth > 0 ? stack[depth - 1] : NULL;
  return SUCCESS;
}

CUresult cuCtxPushCurrent_v2(Context* context) {
  stack[depth++] = context;
  return SUCCESS;
}

CUresult cuCtxPopCurrent_v2(Context** context) {
  *context = stack[--depth];
  return SUCCESS;
}

CUresult cuModuleLoadData(Module** module, const void* image) {
  if (depth == 0) {
    return INVALID_CONTEXT;
  }
  if (*(const char*)image == '!') {
    return INVALID_IMAGE;
  }
  *module = calloc(1, sizeof **module);
  (*module)->context = stack[depth - 1];
  snprintf((*module)->text, sizeof (*module)->text, "%s", (const char*)image);
  __atomic_add_fetch(&loads, 1, __ATOMIC_SEQ_CST);
  return SUCCESS;
}

CUresult cuModuleUnload(Module* module) {
  free(module);
  __atomic_add_fetch(&unloads, 1, __ATOMIC_SEQ_CST);
  return SUCCESS;
}

CUresult cuModuleGetFunction(Function** function, Module* module, const char* symbol) {
  if (strcmp(module->text, symbol) != 0) {
    return NOT_FOUND;
  }
  *function = calloc(1, sizeof **function);
  (*function)->module = module;
  return SUCCESS;
}

CUresult cuFuncSetAttribute(Function* function, int attribute, int value) {
  if (attribute == 8) {
    function->shared = value;
    return value <= 227 * 1024 ? SUCCESS : INVALID_VALUE;
  }
  if (attribute == 14) {
    function->non_portable = value;
    return SUCCESS;
  }
  return INVALID_VALUE;
}

CUresult cuFuncLoad(Function* function) {
  function->loaded = 1;
  return SUCCESS;
}

CUresult cuLaunchKernelEx(const Config* config, Function* function, void** arguments,
                          void** extra) {
  unsigned cluster = 1;
  int pdl = 0;
  for (unsigned i = 0; i < config->attribute_count; ++i) {
    if (config->attributes[i].id == 4) {
      cluster = config->attributes[i].value.cluster[0];
    } else if (config->attributes[i].id == 6) {
      pdl = config->attributes[i].value.programmatic;
    } else {
      return INVALID_VALUE;
    }
  }
  // A real driver refuses this, too.
  if (depth == 0 || stack[depth - 1] != function->module->context) {
    return INVALID_CONTEXT;
  }
  if (extra != NULL || !function->loaded || (cluster > 8 && !function->non_portable) ||
      (int)config->shared_bytes != function->shared || config->grid_x % cluster != 0 ||
      config->grid_x * config->grid_y * config->grid_z == 0) {
    return INVALID_VALUE;
  }
  if (config->block_x * config->block_y * config->block_z > 1024) {
    return LAUNCH_OUT_OF_RESOURCES;
  }
  return callback == NULL
             ? SUCCESS
             : callback(function->module->text, function->module->context->device, config->grid_x,
                        config->grid_y, config->block_x, cluster, config->shared_bytes, pdl,
                        config->stream, arguments);
}

CUresult cuStreamGetCaptureInfo_v2(void* stream, int* status, uint64_t* number, void** graph,
                                   const void** nodes, size_t* count) {
  (void)stream;
  if (graph != NULL || nodes != NULL || count != NULL) {
    return INVALID_VALUE;
  }
  *status = capture != 0;
  *number = capture;
  return SUCCESS;
}

static const char* name_of(CUresult result) {
  switch (result) {
    case INVALID_VALUE: return "CUDA_ERROR_INVALID_VALUE";
    case NO_DEVICE: return "CUDA_ERROR_NO_DEVICE";
    case INVALID_IMAGE: return "CUDA_ERROR_INVALID_IMAGE";
    case LAUNCH_OUT_OF_RESOURCES: return "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES";
    default: return NULL;
  }
}

CUresult cuGetErrorName(CUresult result, const char** name) {
  *name = name_of(result);
  return *name == NULL ? INVALID_VALUE : SUCCESS;
}

CUresult cuGetErrorString(CUresult result, const char** text) {
  *text = "in words";
  return name_of(result) == NULL ? INVALID_VALUE : SUCCESS;
}
