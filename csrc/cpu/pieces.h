// The work of a call in pieces for threads: parts, and rows in segments of one adapter.
#pragma once
#include <algorithm>
#include <vector>

#include "../common.h"
#include "views.h"

namespace fastadapt::cpu {

// Threads that so many multiplications are worth, at most `most`.
inline int64_t useful_parts(int64_t work, int64_t most) {
  return std::max<int64_t>(1, std::min<int64_t>({static_cast<int64_t>(torch::stable::get_num_threads()), work / 400000, most}));
}

// f(part) for each.
template <class F>
void each_part(int64_t parts, const F& f) {
  if (parts == 1) return f(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) f(part);
  });
}

// Rows cut into chunks, and these into segments.
struct Division {
  std::vector<int64_t> order;  // the rows sorted by adapter; empty: as they come
  std::vector<Segment> segments;
  std::vector<int64_t> first_segment;  // of each chunk of rows, and the end
  int64_t segment_rows = 0;            // at most

  // `adapters` has one of [-1, g) for each row, or is null: one adapter, 0. A counting sort keeps the order of its rows.
  void divide(int64_t m, int64_t chunks, int64_t g, const std::vector<int64_t>* adapters) {
    std::vector<int64_t> ends;
    if (adapters) {
      std::vector<int64_t> next(g + 2, 0);
      for (int64_t id : *adapters) ++next[id + 2];
      for (int64_t i = 1; i < g + 2; ++i) next[i] += next[i - 1];
      ends.assign(next.begin() + 1, next.end());
      order.resize(m);
      for (int64_t row = 0; row < m; ++row) order[next[(*adapters)[row] + 1]++] = row;
    }
    int64_t adapter = adapters ? -1 : 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      first_segment.push_back(segments.size());
      int64_t begin = m * chunk / chunks;
      const int64_t end = m * (chunk + 1) / chunks;
      while (begin < end) {
        while (adapters && ends[adapter + 1] <= begin) ++adapter;
        const int64_t stop = adapters ? std::min(end, ends[adapter + 1]) : end;
        segments.push_back({adapter, begin, stop});
        segment_rows = std::max(segment_rows, stop - begin);
        begin = stop;
      }
    }
    first_segment.push_back(segments.size());
  }

  // f(part, number of the segment, segment), a run of chunks for each part.
  template <class F>
  void each_segment(int64_t parts, const F& f) const {
    const int64_t chunks = first_segment.size() - 1;
    each_part(parts, [&](int64_t part) {
      const int64_t first = first_segment[chunks * part / parts], last = first_segment[chunks * (part + 1) / parts];
      for (int64_t i = first; i < last; ++i) {
        Segment segment = segments[i];
        segment.packed = i > first && segments[i - 1].adapter == segment.adapter;
        f(part, i, segment);
      }
    });
  }
};

}  // namespace fastadapt::cpu
