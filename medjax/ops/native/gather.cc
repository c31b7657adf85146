// Parts of an array in a file whose stream of bytes is cut into blocks that begin with a header (array_record).
#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// A copy past the caches: the patch is next read by another thread, or by the device, after many others.
void Stream(char* out, const char* in, int64_t count) {
#ifdef __AVX512F__
  int64_t head = std::min<int64_t>(-reinterpret_cast<intptr_t>(out) & 63, count);
  std::memcpy(out, in, head);
  out += head, in += head, count -= head;
  for (; count >= 64; out += 64, in += 64, count -= 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
  }
#endif
  std::memcpy(out, in, count);
}

constexpr int64_t kScratch = 1 << 20;  // bytes read at a time: they stay in the core's second cache

// A window of the file, and its way from places in the stream to places in the file.
struct Reader {
  int fd;
  int64_t block, header, payload;
  std::vector<char> scratch;
  int64_t base = 0;  // place in the file of the scratch's first byte

  int64_t place(int64_t at) const { return at / payload * block + header + at % payload; }

  int fetch(int64_t first, int64_t count) {
    base = place(first);
    int64_t size = place(first + count - 1) + 1 - base;
    if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(size);
    for (int64_t done = 0; done < size;) {
      ssize_t got = pread(fd, scratch.data() + done, size - done, base + done);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return errno;
      if (got == 0) return -1;
      done += got;
    }
    return 0;
  }

  void copy(int64_t first, int64_t count, char* out) const {
    while (count > 0) {
      int64_t here = std::min(payload - first % payload, count);
      Stream(out, scratch.data() + (place(first) - base), here);
      first += here, out += here, count -= here;
    }
  }
};

}  // namespace

// Copies, for each of `outer` steps and in each of `inner` rows, `run` bytes of the stream to `out`, one after the other.
// Returns 0, -1 where the file ends too soon, or errno.
static int Gather(int fd, int64_t block, int64_t header, int64_t first, int64_t outer, int64_t outer_stride,
                  int64_t inner, int64_t inner_stride, int64_t run, char* out) {
  Reader reader{fd, block, header, block - header, {}};
  if (run == 0) return 0;
  // Rows that lie far apart, or are long, are read one by one; a long one in parts.
  int64_t rows = inner_stride > 4 * run + 8192 ? 1 : std::max<int64_t>(1, kScratch / std::max<int64_t>(inner_stride, 1));
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; j += rows) {
      int64_t many = std::min(rows, inner - j), at = first + i * outer_stride + j * inner_stride;
      if (many == 1) {
        for (int64_t done = 0; done < run;) {
          int64_t part = std::min(kScratch, run - done);
          if (int error = reader.fetch(at + done, part)) return error;
          reader.copy(at + done, part, out);
          done += part, out += part;
        }
        continue;
      }
      if (int error = reader.fetch(at, (many - 1) * inner_stride + run)) return error;
      for (int64_t k = 0; k < many; ++k, out += run) reader.copy(at + k * inner_stride, run, out);
    }
  }
  return 0;
}

extern "C" int medjax_gather(int fd, int64_t block, int64_t header, int64_t first, int64_t outer, int64_t outer_stride,
                             int64_t inner, int64_t inner_stride, int64_t run, char* out) {
  int error = Gather(fd, block, header, first, outer, outer_stride, inner, inner_stride, run, out);
#ifdef __AVX512F__
  _mm_sfence();
#endif
  return error;
}
