/* A libcuda.so.1 without a GPU: loading a kernel gives it a handle, launching one notes what was launched.

   Only what Triton's launcher of NVIDIA's backend calls is here; see stub_driver.py. */

#include <stdint.h>

typedef struct {
  uint32_t grid_x; /* the rest of CUlaunchConfig is not looked at */
} Config;

/* What the last launch was given: its kernel's handle, its grid, and so many of its parameters. */
int64_t stub_launches, stub_function, stub_grid;
int32_t stub_num_params;
int64_t stub_params[64];

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(int64_t *context, int device) { *context = 1; return 0; }
int cuCtxGetCurrent(int64_t *context) { *context = 1; return 0; }
int cuCtxSetCurrent(int64_t context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(int64_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, int64_t value) { return 0; }
/* Every attribute is the shared memory of an H100's block, which is all that a launch asks for. */
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "from the stubbed driver"; return 0; }
int cuStreamIsCapturing(int64_t stream, int *status) { *status = 0; return 0; }
int cuTensorMapEncodeTiled(void) { return 801; }  /* not supported */
int cuTensorMapEncodeIm2col(void) { return 801; } /* not supported */
int cuOccupancyMaxActiveClusters(int *count, int64_t function, void *config) { *count = 1; return 0; }

int cuModuleLoadData(int64_t *module, const void *image) {
  static int64_t loaded;
  *module = ++loaded;
  return 0;
}
int cuModuleUnload(int64_t module) { return 0; }
int cuModuleGetFunction(int64_t *function, int64_t module, const char *name) { *function = module; return 0; }
int cuFuncGetAttribute(int *value, int attribute, int64_t function) { *value = 1024; return 0; } /* threads */
int cuFuncSetAttribute(int64_t function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(int64_t function, int config) { return 0; }

int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { *(uint64_t *)value = pointer; return 0; }
int cuPointerGetAttributes(unsigned count, int *attributes, void **values, uint64_t pointer) { return 801; }

int cuLaunchKernelEx(const Config *config, int64_t function, void **params, void **extra) {
  ++stub_launches;
  stub_function = function;
  stub_grid = config->grid_x;
  for (int i = 0; i < stub_num_params; ++i) stub_params[i] = *(int64_t *)params[i];
  return 0;
}
