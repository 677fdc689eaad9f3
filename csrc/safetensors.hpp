// Parser of a safetensors header from untrusted bytes. The reference implementation accepts every
// header that this one accepts, with the same meaning.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "reader.hpp"

namespace fastsafe {

constexpr std::uint64_t kPrefixBytes = 8;               // the header's length, little-endian
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the reference's limit
constexpr std::size_t kMaxTensors = 1'000'000;
constexpr std::size_t kMaxRank = 8;
constexpr std::uint64_t kMaxDim = std::uint64_t{1} << 48;
constexpr std::size_t kMaxNameBytes = 1024;
constexpr std::size_t kMaxMetadataBytes = 1 << 20;

struct Dtype {
  std::string_view name;
  unsigned bits;
};

struct TensorInfo {
  std::string name;
  const Dtype* dtype = nullptr;
  std::array<std::uint64_t, kMaxRank> shape{};
  std::size_t rank = 0;
  std::uint64_t begin = 0;  // bytes, from the start of the data
  std::uint64_t end = 0;
};

struct Header {
  std::vector<TensorInfo> tensors;  // in the order of their data
  std::vector<std::pair<std::string, std::string>> metadata;
  std::uint64_t data_offset = 0;  // bytes, from the start of the file
};

// Length in bytes of the JSON text, from the first 8 bytes of a file of `file_bytes`.
std::uint64_t header_bytes(const unsigned char prefix[kPrefixBytes], std::uint64_t file_bytes);

// Parses the JSON text of a file with `data_bytes` after it.
Header parse_header(std::string_view json, std::uint64_t data_bytes);

// Reads and parses the header of an open file.
Header read_header(const File& file);

}  // namespace fastsafe
