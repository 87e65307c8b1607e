// The GPU kernels of sparsegpt.py, in float32. The ops there have plain code for the same.
// CuPy compiles this file with -DWIDTH=... when one of them is first called.

#ifndef WIDTH
#define WIDTH 1024  // the length of a row of which keep_k keeps some, in registers
#endif
#define EACH ((WIDTH + 31) / 32)  // values of such a row that a thread holds

template <class T> __device__ T warp_sum(T x) {
    for (int s = 16; s; s /= 2) x += __shfl_xor_sync(~0u, x, s);
    return x;
}

// ---- a warp a row: `row` and `lane` of a thread, for a block of 32 x 4 -------------------------

#define ROW int lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y; \
    if (row >= rows) return

// Leaves -1 of a warp's values >= 0, but for the k largest, the first of equals. Value i of a
// thread is that of column 32 * i + lane.
__device__ void keep_k(int* v, int k, int lane) {
    int least = 0;  // the k-th largest, found bit by bit: the largest that k of them reach
    for (int bit = 1 << 30; bit; bit >>= 1) {
        int n = 0;
        #pragma unroll
        for (int i = 0; i < EACH; i++) n += v[i] >= (least | bit);
        if (warp_sum(n) >= k) least |= bit;
    }
    int room = k;  // for equals of the k-th: what those above it leave
    #pragma unroll
    for (int i = 0; i < EACH; i++) room -= __popc(__ballot_sync(~0u, v[i] > least));
    #pragma unroll
    for (int i = 0; i < EACH; i++) {
        unsigned ties = __ballot_sync(~0u, v[i] == least);
        if (v[i] < least || (v[i] == least && __popc(ties & ((1u << lane) - 1)) >= room))
            v[i] = -1;
        room -= __popc(ties);
    }
}

__device__ int key(float x) { return __float_as_int(x) & 0x7fffffff; }  // |x|: sorts alike

extern "C" __global__ void abstopk(int rows, const float* x, float* out, bool* mask, int k) {
    ROW;
    int v[EACH];
    long long at = (long long)row * WIDTH;
    #pragma unroll
    for (int i = 0; i < EACH; i++)
        v[i] = 32 * i + lane < WIDTH ? key(x[at + 32 * i + lane]) : -1;
    keep_k(v, k, lane);
    #pragma unroll
    for (int i = 0; i < EACH; i++)
        if (32 * i + lane < WIDTH) {
            out[at + 32 * i + lane] = v[i] >= 0 ? x[at + 32 * i + lane] : 0;
            mask[at + 32 * i + lane] = v[i] >= 0;
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

// e: the softmax over the keys that the query sees, and 0 for the others.
extern "C" __global__ void softmax(int rows, const float* x, float* e, const float* sink,
                                   float* to_sink, int queries, int heads) {
    ROW;
    x += (long long)row * queries, e += (long long)row * queries;
    int last = row % queries;  // the last key that this query sees
    float own = sink[row / queries % heads], top = own, sum = 0;
    for (int i = lane; i <= last; i += 32) top = fmaxf(top, x[i]);
    for (int s = 16; s; s /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, s));
    for (int i = lane; i <= last; i += 32) sum += e[i] = expf(x[i] - top);
    own = expf(own - top);
    sum = warp_sum(sum) + own;
    for (int i = lane; i < queries; i += 32) e[i] = i <= last ? e[i] / sum : 0;
    if (lane == 0) to_sink[row] = own / sum;
}

extern "C" __global__ void softmax_backward(int rows, const float* d, const float* weights,
                                            float* out, float* along, int queries) {
    ROW;
    long long at = (long long)row * queries;
    d += at, weights += at, out += at;
    int last = row % queries;
    float sum = 0;
    for (int i = lane; i <= last; i += 32) sum += d[i] * weights[i];
    sum = warp_sum(sum);
    for (int i = lane; i < queries; i += 32) out[i] = i <= last ? (d[i] - sum) * weights[i] : 0;
    if (lane == 0) along[row] = sum;
}

// ---- weight top-k: all matrices at once --------------------------------------------------------
// Keys are |w|, or infinite for the j largest of each neuron: the k largest keys stay.

struct Matrix { float* w; int* keys; long long n, k, j, stride; };  // stride: in a neuron

extern "C" __global__ void neuron_keys(const Matrix* all) {  // blockIdx.y is the matrix
    Matrix m = all[blockIdx.y];
    int rows = (m.n + WIDTH - 1) / WIDTH, v[EACH];
    ROW;
    long long at = m.stride > 1 ? row : (long long)row * WIDTH;
    #pragma unroll
    for (int i = 0; i < EACH; i++) {
        long long column = 32 * i + lane, here = at + column * m.stride;
        v[i] = column < WIDTH && here < m.n ? key(m.w[here]) : -1;
    }
    if (m.j) keep_k(v, m.j, lane);
    #pragma unroll
    for (int i = 0; i < EACH; i++) {
        long long column = 32 * i + lane, here = at + column * m.stride;
        if (column < WIDTH && here < m.n)
            m.keys[here] = m.j && v[i] >= 0 ? 0x7f800000 : key(m.w[here]);
    }
}

extern "C" __global__ void cut(const Matrix* all) {  // a block a matrix
    Matrix m = all[blockIdx.x];
    __shared__ int reach[31];  // how many keys reach what each bit is tried with
    if (threadIdx.x < 31) reach[threadIdx.x] = 0;
    __syncthreads();
    int least = 0;  // the k-th largest key, as in keep_k
    long long surplus = 0;
    for (int i = 0; i < 31; i++) {
        int trial = least | 1 << (30 - i), n = 0;
        for (long long at = threadIdx.x; at < m.n; at += blockDim.x) n += m.keys[at] >= trial;
        atomicAdd(&reach[i], n);
        __syncthreads();
        if (reach[i] >= m.k) least = trial, surplus = reach[i] - m.k;
    }
    // The last equals of the k-th are too many; if they are zeros, they need no cutting.
    for (long long end = m.n; threadIdx.x < 32 && surplus > 0; end -= 32) {
        long long at = end - 1 - threadIdx.x;
        unsigned ties = __ballot_sync(~0u, at >= 0 && m.keys[at] == least);
        if (ties >> threadIdx.x & 1 && __popc(ties & ((1u << threadIdx.x) - 1)) < surplus)
            m.keys[at] = -1;
        surplus -= __popc(ties);
    }
    __syncthreads();
    for (long long at = threadIdx.x; at < m.n; at += blockDim.x)
        if (m.keys[at] < least) m.w[at] = 0;
}
