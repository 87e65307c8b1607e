// The GPU kernels of sparsegpt.py, in float32. The ops there have plain code for the same.
// CuPy compiles this file with -DWIDTH=... when one of them is first called.

#ifndef WIDTH
#define WIDTH 1024  // the length of a row of abstopk, whose values stay in registers
#endif

__device__ float warp_sum(float x) {
    for (int s = 16; s; s /= 2) x += __shfl_xor_sync(~0u, x, s);
    return x;
}

// ---- a warp a row: `row` and `lane` of a thread, for a block of 32 x 4 --------------------------

#define ROW int lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y; \
    if (row >= rows) return

extern "C" __global__ void abstopk(int rows, const float* x, float* out, bool* mask, int k) {
    ROW;
    int v[(WIDTH + 31) / 32];
    long long at = (long long)row * WIDTH;
    #pragma unroll
    for (int i = 0; i < (WIDTH + 31) / 32; i++)  // |x| as integers, in registers
        v[i] = 32 * i + lane < WIDTH ? __float_as_int(x[at + 32 * i + lane]) & 0x7fffffff : -1;
    int least = 0;  // the k-th largest, found bit by bit: the largest that k of them reach
    for (int bit = 1 << 30; bit; bit >>= 1) {
        int n = 0;
        #pragma unroll
        for (int i = 0; i < (WIDTH + 31) / 32; i++) n += v[i] >= (least | bit);
        for (int s = 16; s; s /= 2) n += __shfl_xor_sync(~0u, n, s);
        if (n >= k) least |= bit;
    }
    int room = k;  // for equals of the k-th: what those above it leave
    #pragma unroll
    for (int i = 0; i < (WIDTH + 31) / 32; i++)
        room -= __popc(__ballot_sync(~0u, v[i] > least));
    #pragma unroll
    for (int i = 0; i < (WIDTH + 31) / 32; i++) {
        unsigned ties = __ballot_sync(~0u, v[i] == least);
        bool keep = v[i] > least
            || (v[i] == least && __popc(ties & ((1u << lane) - 1)) < room);
        room -= __popc(ties);
        if (32 * i + lane < WIDTH) {
            out[at + 32 * i + lane] = keep ? x[at + 32 * i + lane] : 0;
            mask[at + 32 * i + lane] = keep;
        }
    }
}

extern "C" __global__ void rmsnorm(int rows, const float* x, float* out, float* scale, int width,
                                   float eps) {
    ROW;
    float sum = 0;
    x += (long long)row * width, out += (long long)row * width;
    for (int i = lane; i < width; i += 32) sum += x[i] * x[i];
    float s = 1 / sqrtf(warp_sum(sum) / width + eps);
    for (int i = lane; i < width; i += 32) out[i] = x[i] * s;
    if (lane == 0) scale[row] = s;
}

extern "C" __global__ void rmsnorm_backward(int rows, const float* dout, const float* out,
                                            const float* scale, float* dx, int width) {
    ROW;
    long long at = (long long)row * width;
    float sum = 0;
    for (int i = lane; i < width; i += 32) sum += dout[at + i] * out[at + i];
    sum = warp_sum(sum) / width;
    for (int i = lane; i < width; i += 32)
        dx[at + i] = (dout[at + i] - out[at + i] * sum) * scale[row];
}

// e: logits, which become exp(logit - the row's largest), and 0 for keys after the query.
extern "C" __global__ void softmax(int rows, float* e, const float* sink, float* total,
                                   float* to_sink, int queries, int heads) {
    ROW;
    e += (long long)row * queries;
    int last = row % queries;  // the last key that this query sees
    float own = sink[row / queries % heads], top = own, sum = 0;
    for (int i = lane; i <= last; i += 32) top = fmaxf(top, e[i]);
    for (int s = 16; s; s /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, s));
    for (int i = lane; i < queries; i += 32) sum += e[i] = i <= last ? expf(e[i] - top) : 0;
    own = expf(own - top);
    sum = warp_sum(sum) + own;
    if (lane == 0) total[row] = sum, to_sink[row] = own / sum;
}

// ---- the k largest of n keys, integers >= 0: four passes, each finds 8 bits of the k-th ---------

struct Kth { int bits, rank; };  // its first bits; its rank among the keys that begin with them

// The k-th after `digits` of four passes. counts: [4, 256] keys that share the digits before, by
// their next one. known: [5], after each pass, kept for the next. For a block of 256 threads.
__device__ Kth kth(int digits, int k, Kth* known, const int* counts) {
    if (digits == 0) return Kth{0, k};
    __shared__ int least[257];  // how many of the keys have at least this next digit
    __shared__ Kth found;
    int v = threadIdx.x;
    Kth before = digits == 1 ? Kth{0, k} : known[digits - 1];
    least[v] = counts[256 * (digits - 1) + v];
    least[256] = 0;
    __syncthreads();
    for (int s = 1; s < 256; s *= 2) {
        int more = v + s < 256 ? least[v + s] : 0;
        __syncthreads();
        least[v] += more;
        __syncthreads();
    }
    if (least[v] >= before.rank && least[v + 1] < before.rank) {
        found = Kth{before.bits << 8 | v, before.rank - least[v + 1]};
        if (blockIdx.x == 0) known[digits] = found;
    }
    __syncthreads();
    return found;
}

extern "C" __global__ void count_digit(int n, const int* keys, int digits, int k, Kth* known,
                                       int* counts) {
    __shared__ int here[256];
    here[threadIdx.x] = 0;
    Kth now = kth(digits, k, known, counts);
    __syncthreads();
    for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256)
        if (digits == 0 || keys[i] >> (32 - 8 * digits) == now.bits)
            atomicAdd(&here[keys[i] >> (24 - 8 * digits) & 255], 1);
    __syncthreads();
    if (here[threadIdx.x]) atomicAdd(&counts[256 * digits + threadIdx.x], here[threadIdx.x]);
}

extern "C" __global__ void mask_from_kth(int n, const int* keys, int k, Kth* known,
                                         const int* counts, bool* mask) {
    Kth now = kth(4, k, known, counts);
    for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256)
        mask[i] = keys[i] >= now.bits;
}

// Drops the last equals of the k-th that are too many. One warp: there are seldom any.
extern "C" __global__ void drop_ties(int n, const int* keys, const Kth* known, const int* counts,
                                     bool* mask) {
    int lane = threadIdx.x, surplus = counts[768 + (known[4].bits & 255)] - known[4].rank;
    for (int end = n; surplus > 0; end -= 32) {
        int i = end - 1 - lane;
        unsigned ties = __ballot_sync(~0u, i >= 0 && keys[i] == known[4].bits);
        if (ties >> lane & 1 && __popc(ties & ((1u << lane) - 1)) < surplus) mask[i] = false;
        surplus -= __popc(ties);
    }
}
