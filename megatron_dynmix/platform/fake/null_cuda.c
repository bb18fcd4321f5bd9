/* A CUDA runtime and driver with one device that does nothing, loaded before torch's own.
 *
 * torch's CUDA build then sees a device, and its autograd runs over fake CUDA tensors, which have shapes but no
 * data: nothing is ever computed here. Declared by hand, so that no CUDA headers are needed: every argument
 * is a pointer or an integer, and every answer is 0, success.
 */
#include <stdlib.h>
#include <string.h>

#define DOES_NOTHING { return 0; }
#define VERSION 13000

/* the runtime */
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) DOES_NOTHING
int cudaDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = VERSION; return 0; }
int cudaGetLastError(void) DOES_NOTHING
int cudaPeekAtLastError(void) DOES_NOTHING
int cudaDeviceSynchronize(void) DOES_NOTHING
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = malloc(8); return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamQuery(void *stream) DOES_NOTHING
int cudaStreamSynchronize(void *stream) DOES_NOTHING
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) DOES_NOTHING
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = malloc(8); return 0; }
int cudaEventRecord(void *event, void *stream) DOES_NOTHING
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) DOES_NOTHING
int cudaEventDestroy(void *event) { free(event); return 0; }
int cudaEventQuery(void *event) DOES_NOTHING
int cudaEventSynchronize(void *event) DOES_NOTHING
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) DOES_NOTHING
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = (size_t)80 << 30; return 0; }
int cudaMalloc(void **block, size_t size) { *block = aligned_alloc(512, (size + 511) & ~(size_t)511); return 0; }
int cudaFree(void *block) { free(block); return 0; }
int cudaPointerGetAttributes(void *attributes, const void *pointer) { memset(attributes, 0, 8); return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 /* major */ ? 9 : attribute == 76 /* minor */ ? 0 : attribute == 16 /* SMs */ ? 132 : 1;
  return 0;
}
/* the beginning of what CUDA 12 and 13 have alike; by the compute capability torch chooses a kernel of attention */
struct properties {
  char name[256], uuid[16], luid[8];
  unsigned luid_mask;
  size_t memory, shared_memory;
  int registers, warp;
  size_t pitch;
  int threads, block[3], grid[3];
  size_t constant_memory;
  int major, minor;
  size_t alignment, pitch_alignment;
  int processors;
};
int cudaGetDeviceProperties(struct properties *of, int device) {
  strcpy(of->name, "NVIDIA H100"); /* into memory that torch has set to zero */
  of->memory = (size_t)80 << 30;
  of->shared_memory = 48 << 10;
  of->warp = 32;
  of->threads = 1024;
  of->major = 9;
  of->processors = 132;
  return 0;
}
int cudaGetDeviceProperties_v2(struct properties *of, int device) { return cudaGetDeviceProperties(of, device); }

/* the driver, of which torch asks a few things itself */
int cuInit(unsigned flags) DOES_NOTHING
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuCtxGetCurrent(void **context) { static int only; *context = &only; return 0; }
int cuCtxSetCurrent(void *context) DOES_NOTHING
