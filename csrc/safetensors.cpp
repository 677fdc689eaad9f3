#include "safetensors.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <tuple>

namespace fastsafe {
namespace {

constexpr const char* kCorrupt = "; the file is corrupt, download or write it again";

constexpr Dtype kDtypes[] = {
    {"BF16", 16},       {"F16", 16},        {"F32", 32},    {"F64", 64},     {"I64", 64},
    {"I32", 32},        {"I16", 16},        {"I8", 8},      {"U64", 64},     {"U32", 32},
    {"U16", 16},        {"U8", 8},          {"BOOL", 8},    {"C64", 64},     {"F8_E4M3", 8},
    {"F8_E5M2", 8},     {"F8_E8M0", 8},     {"F4", 4},      {"F6_E2M3", 6},  {"F6_E3M2", 6},
    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
};

std::string number(std::uint64_t n) { return std::to_string(n); }

// Printable ASCII for messages: a name comes from the file and may try to drive a terminal.
std::string quote(std::string_view text) {
  constexpr std::size_t kShown = 80;
  std::string out = "'";
  for (const char c : text.substr(0, kShown)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      constexpr const char* kHex = "0123456789abcdef";
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out + (text.size() > kShown ? "...'" : "'");
}

std::string shape_of(const TensorInfo& tensor) {
  std::string out = "[";
  for (std::size_t i = 0; i < tensor.rank; ++i) {
    out += (i ? ", " : "") + number(tensor.shape[i]);
  }
  return out + "]";
}

bool is_continuation(unsigned char byte) { return (byte & 0xc0) == 0x80; }

// Offset of the first byte that is not UTF-8, or text.size().
std::size_t first_invalid_utf8(std::string_view text) {
  const auto* s = reinterpret_cast<const unsigned char*>(text.data());
  const std::size_t n = text.size();
  std::size_t i = 0;
  while (i < n) {
    std::uint64_t word;
    if (i + sizeof word <= n) {
      std::memcpy(&word, s + i, sizeof word);
      if ((word & 0x8080808080808080u) == 0) {
        i += sizeof word;
        continue;
      }
    }
    const unsigned char c = s[i];
    if (c < 0x80) {
      i += 1;
    } else if (c >= 0xc2 && c <= 0xdf && i + 1 < n && is_continuation(s[i + 1])) {
      i += 2;
    } else if ((c & 0xf0) == 0xe0 && i + 2 < n && is_continuation(s[i + 1]) &&
               is_continuation(s[i + 2]) && !(c == 0xe0 && s[i + 1] < 0xa0) &&
               !(c == 0xed && s[i + 1] > 0x9f)) {  // not overlong, not a surrogate
      i += 3;
    } else if (c >= 0xf0 && c <= 0xf4 && i + 3 < n && is_continuation(s[i + 1]) &&
               is_continuation(s[i + 2]) && is_continuation(s[i + 3]) &&
               !(c == 0xf0 && s[i + 1] < 0x90) && !(c == 0xf4 && s[i + 1] > 0x8f)) {
      i += 4;
    } else {
      return i;
    }
  }
  return n;
}

void append_utf8(std::string& out, std::uint32_t point) {
  if (point < 0x80) {
    out += static_cast<char>(point);
    return;
  }
  const int tail = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
  constexpr unsigned char kLead[] = {0, 0xc0, 0xe0, 0xf0};
  out += static_cast<char>(kLead[tail] | (point >> (6 * tail)));
  for (int i = tail - 1; i >= 0; --i) {
    out += static_cast<char>(0x80 | ((point >> (6 * i)) & 0x3f));
  }
}

// C0, DEL, C1, and the marks that reorder text on a screen.
bool has_control_character(std::string_view name) {
  for (std::size_t i = 0; i < name.size(); ++i) {
    const auto at = [&](std::size_t k) {
      return i + k < name.size() ? static_cast<unsigned char>(name[i + k]) : 0;
    };
    const unsigned c = at(0), d = at(1), e = at(2);
    if (c < 0x20 || c == 0x7f || (c == 0xc2 && d < 0xa0)) return true;
    if (c == 0xe2 && d == 0x80 && (e == 0x8e || e == 0x8f || (e >= 0xaa && e <= 0xae))) return true;
    if (c == 0xe2 && d == 0x81 && e >= 0xa6 && e <= 0xa9) return true;
  }
  return false;
}

// By sorting: hashes chosen by the file's author cannot make it slow.
void refuse_duplicates(const std::vector<std::string_view>& names, const std::string& what) {
  std::vector<std::pair<std::size_t, std::string_view>> sorted;
  sorted.reserve(names.size());
  for (const auto name : names) sorted.emplace_back(std::hash<std::string_view>{}(name), name);
  std::sort(sorted.begin(), sorted.end());
  const auto twin = std::adjacent_find(sorted.begin(), sorted.end());
  if (twin != sorted.end()) {
    throw Error(what + " " + quote(twin->second) + " appears twice, expected once" + kCorrupt);
  }
}

// Recursion-free: the grammar of a header has three fixed levels and unknown keys are refused, so
// nothing is ever skipped over.
class Parser {
 public:
  explicit Parser(std::string_view text)
      : start_(text.data()), at_(text.data()), end_(text.data() + text.size()) {}

  Header header() {
    Header header;
    if (peek() != '{') malformed("'{' as the first byte");
    ++at_;
    bool has_metadata = false;
    for (bool more = !closes('}'); more; more = continues('}')) {
      std::string name = string(kMaxNameBytes, "name of a tensor");
      expect(':');
      if (name == "__metadata__") {
        if (has_metadata) throw Error("__metadata__ appears twice, expected once" + fix());
        has_metadata = true;
        metadata(header.metadata);
        continue;
      }
      if (header.tensors.size() == kMaxTensors) {
        throw Error("header lists more than " + number(kMaxTensors) +
                    " tensors, expected at most that many");
      }
      TensorInfo& tensor = header.tensors.emplace_back();
      tensor.name = std::move(name);
      info(tensor);
    }
    skip_space();
    if (at_ != end_ && *at_ == '\0') {
      throw Error("header is padded with NUL from byte " + number(kPrefixBytes + offset()) +
                  ", expected spaces; write the file again with a correct writer");
    }
    if (at_ != end_) malformed("the end of the header");
    return header;
  }

 private:
  std::uint64_t offset() const { return static_cast<std::uint64_t>(at_ - start_); }
  static std::string fix() { return kCorrupt; }

  [[noreturn]] void malformed(const std::string& expected) const {
    const std::string found = at_ == end_ ? "its end" : quote({at_, 1});
    throw Error("header is malformed at byte " + number(kPrefixBytes + offset()) + ": found " +
                found + ", expected " + expected + kCorrupt);
  }

  // NUL at the end of the text: no rule of the grammar accepts that byte.
  char peek() const { return at_ == end_ ? '\0' : *at_; }

  void skip_space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_;
  }

  void expect(char wanted) {
    skip_space();
    if (peek() != wanted) malformed(quote({&wanted, 1}));
    ++at_;
    skip_space();
  }

  // After an opening bracket: whether it closes at once.
  bool closes(char bracket) {
    skip_space();
    if (peek() != bracket) return false;
    ++at_;
    return true;
  }

  // After an element: whether a comma promises another one; otherwise the bracket closes.
  bool continues(char bracket) {
    skip_space();
    const char c = peek();
    if (c != ',' && c != bracket) malformed("',' or " + quote({&bracket, 1}));
    ++at_;
    skip_space();
    return c == ',';
  }

  std::uint32_t hex4() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const char lower = static_cast<char>(c | 0x20);
      if (c >= '0' && c <= '9') {
        value = value * 16 + static_cast<std::uint32_t>(c - '0');
      } else if (lower >= 'a' && lower <= 'f') {
        value = value * 16 + static_cast<std::uint32_t>(lower - 'a' + 10);
      } else {
        malformed("four hexadecimal digits");
      }
    }
    return value;
  }

  void escape(std::string& out) {
    const char c = peek();
    constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    const std::size_t i = kFrom.find(c);
    if (i != std::string_view::npos) {
      ++at_;
      out += kTo[i];
      return;
    }
    if (c != 'u') malformed("a JSON escape");
    ++at_;
    std::uint32_t point = hex4();
    if (point >= 0xd800 && point <= 0xdbff && peek() == '\\') {
      ++at_;
      if (peek() != 'u') malformed("the second half of a surrogate pair");
      ++at_;
      const std::uint32_t low = hex4();
      if (low < 0xdc00 || low > 0xdfff) malformed("the second half of a surrogate pair");
      point = 0x10000 + ((point - 0xd800) << 10) + (low - 0xdc00);
    } else if (point >= 0xd800 && point <= 0xdfff) {
      malformed("no lone surrogate");
    }
    append_utf8(out, point);
  }

  std::string string(std::size_t max_bytes, const std::string& what) {
    if (peek() != '"') malformed("a string for the " + what);
    ++at_;
    std::string out;
    for (;;) {
      const char* run = at_;
      while (at_ != end_ && *at_ != '"' && *at_ != '\\' &&
             static_cast<unsigned char>(*at_) >= 0x20) {
        ++at_;
      }
      if (out.size() + static_cast<std::size_t>(at_ - run) > max_bytes) {
        throw Error(what + " has more than " + number(max_bytes) + " bytes, expected at most that");
      }
      out.append(run, at_);
      if (peek() == '"' && at_ != end_) {
        ++at_;
        return out;
      }
      if (peek() != '\\') malformed("'\"' at the end of the " + what);
      ++at_;
      escape(out);
    }
  }

  std::uint64_t integer(const TensorInfo& tensor, const char* what) {
    const char* first = at_;
    std::uint64_t value = 0;
    bool fits = true;
    for (; peek() >= '0' && peek() <= '9'; ++at_) {
      fits = fits && !__builtin_mul_overflow(value, 10u, &value) &&
             !__builtin_add_overflow(value, static_cast<unsigned>(*at_ - '0'), &value);
    }
    const bool leading_zero = at_ - first > 1 && *first == '0';
    const char next = peek();
    if (at_ == first || leading_zero || next == '.' || next == 'e' || next == 'E') {
      at_ = first;
      malformed(std::string("a non-negative integer for ") + what + " of tensor " +
                quote(tensor.name));
    }
    if (!fits) {
      throw Error("tensor " + quote(tensor.name) + " has a " + what + " of " +
                  quote({first, static_cast<std::size_t>(at_ - first)}) +
                  ", expected less than 2^64" + kCorrupt);
    }
    return value;
  }

  void metadata(std::vector<std::pair<std::string, std::string>>& entries) {
    if (peek() != '{') malformed("'{' to begin __metadata__");
    ++at_;
    std::size_t budget = kMaxMetadataBytes;
    for (bool more = !closes('}'); more; more = continues('}')) {
      std::string key = string(budget, "key in __metadata__");
      expect(':');
      budget -= key.size();
      std::string value = string(budget, "value of __metadata__ " + quote(key));
      budget -= value.size();
      entries.emplace_back(std::move(key), std::move(value));
    }
    std::vector<std::string_view> keys;
    for (const auto& entry : entries) keys.push_back(entry.first);
    refuse_duplicates(keys, "__metadata__ key");
  }

  void info(TensorInfo& tensor) {
    if (tensor.name.empty()) throw Error("a tensor has an empty name, expected a name" + fix());
    if (has_control_character(tensor.name)) {
      throw Error("tensor " + quote(tensor.name) +
                  " has a control character in its name, expected printable text");
    }
    if (peek() != '{') malformed("'{' to begin tensor " + quote(tensor.name));
    ++at_;
    bool has_shape = false, has_offsets = false;
    for (bool more = !closes('}'); more; more = continues('}')) {
      const std::string key = string(kMaxNameBytes, "key of a tensor");
      expect(':');
      const bool again = (key == "dtype" && tensor.dtype) || (key == "shape" && has_shape) ||
                         (key == "data_offsets" && has_offsets);
      if (again) {
        throw Error("tensor " + quote(tensor.name) + " has " + key + " twice, expected once" +
                    kCorrupt);
      }
      if (key == "dtype") {
        dtype(tensor);
      } else if (key == "shape") {
        shape(tensor);
        has_shape = true;
      } else if (key == "data_offsets") {
        offsets(tensor);
        has_offsets = true;
      } else {
        throw Error("tensor " + quote(tensor.name) + " has the unknown key " + quote(key) +
                    ", expected dtype, shape and data_offsets only");
      }
    }
    const char* missing = !tensor.dtype  ? "dtype"
                          : !has_shape   ? "shape"
                          : !has_offsets ? "data_offsets"
                                         : nullptr;
    if (missing) throw Error("tensor " + quote(tensor.name) + " has no " + missing + kCorrupt);
    check_size(tensor);
  }

  void dtype(TensorInfo& tensor) {
    const std::string name = string(kMaxNameBytes, "dtype of tensor " + quote(tensor.name));
    for (const Dtype& dtype : kDtypes) {
      if (dtype.name == name) tensor.dtype = &dtype;
    }
    if (!tensor.dtype) {
      throw Error("tensor " + quote(tensor.name) + " has dtype " + quote(name) +
                  ", expected one of the safetensors dtypes such as F32 or BF16");
    }
  }

  void shape(TensorInfo& tensor) {
    if (peek() != '[') malformed("'[' to begin the shape of tensor " + quote(tensor.name));
    ++at_;
    for (bool more = !closes(']'); more; more = continues(']')) {
      const std::uint64_t dim = integer(tensor, "dimension");
      if (dim > kMaxDim) {
        throw Error("tensor " + quote(tensor.name) + " has a dimension of " + number(dim) +
                    ", expected at most 2^48" + kCorrupt);
      }
      if (tensor.rank == kMaxRank) {
        throw Error("tensor " + quote(tensor.name) + " has more than " + number(kMaxRank) +
                    " dimensions, expected at most that");
      }
      tensor.shape[tensor.rank++] = dim;
    }
  }

  void offsets(TensorInfo& tensor) {
    if (peek() != '[') malformed("'[' to begin the data_offsets of tensor " + quote(tensor.name));
    ++at_;
    skip_space();
    tensor.begin = integer(tensor, "offset");
    expect(',');
    tensor.end = integer(tensor, "offset");
    expect(']');
    if (tensor.end < tensor.begin) {
      throw Error("tensor " + quote(tensor.name) + " ends at byte " + number(tensor.end) +
                  ", expected not before its begin " + number(tensor.begin) + kCorrupt);
    }
  }

  static void check_size(const TensorInfo& tensor) {
    std::uint64_t bits = tensor.dtype->bits;
    bool empty = false;
    for (std::size_t i = 0; i < tensor.rank; ++i) {
      // a zero must not hide an overflow of the other dimensions
      empty = empty || tensor.shape[i] == 0;
      const std::uint64_t dim = std::max<std::uint64_t>(1, tensor.shape[i]);
      if (__builtin_mul_overflow(bits, dim, &bits)) {
        throw Error("tensor " + quote(tensor.name) + " has shape " + shape_of(tensor) +
                    ", expected fewer than 2^64 bits" + kCorrupt);
      }
    }
    if (empty) bits = 0;
    const std::string type = std::string(tensor.dtype->name) + " " + shape_of(tensor);
    if (bits % 8 != 0) {
      throw Error("tensor " + quote(tensor.name) + " is " + type + " of " + number(bits) +
                  " bits, expected whole bytes" + kCorrupt);
    }
    if (tensor.end - tensor.begin != bits / 8) {
      throw Error("tensor " + quote(tensor.name) + " has " + number(tensor.end - tensor.begin) +
                  " bytes of data, expected " + number(bits / 8) + " for " + type + kCorrupt);
    }
  }

  const char* start_;
  const char* at_;
  const char* end_;
};

// The data is one run without hole or overlap, from its first byte to the last of the file.
void check_coverage(std::vector<TensorInfo>& tensors, std::uint64_t data_bytes) {
  const auto before = [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  };
  if (!std::is_sorted(tensors.begin(), tensors.end(), before)) {
    std::stable_sort(tensors.begin(), tensors.end(), before);
  }
  std::uint64_t covered = 0;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.begin != covered) {
      throw Error("tensor " + quote(tensor.name) + " begins at byte " + number(tensor.begin) +
                  " of the data, expected " + number(covered) + " where the one before ends (" +
                  (tensor.begin > covered ? "a hole" : "an overlap") + ")" + kCorrupt);
    }
    covered = tensor.end;
  }
  if (covered > data_bytes) {
    throw Error("file has " + number(data_bytes) + " bytes of data, expected " + number(covered) +
                "; the download is incomplete, repeat it");
  }
  if (covered < data_bytes) {
    throw Error("file has " + number(data_bytes) + " bytes of data, expected " + number(covered) +
                "; something was appended, download or write it again");
  }
}

}  // namespace

std::uint64_t header_bytes(const unsigned char prefix[kPrefixBytes], std::uint64_t file_bytes) {
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | prefix[i];
  if (length > kMaxHeaderBytes) {
    throw Error("header length is " + number(length) + " bytes, expected at most " +
                number(kMaxHeaderBytes) + "; the file is not safetensors or is corrupt");
  }
  if (length > file_bytes - kPrefixBytes) {
    throw Error("file has " + number(file_bytes) + " bytes, expected at least " +
                number(kPrefixBytes + length) + " for its header; the download is incomplete, "
                "repeat it");
  }
  return length;
}

Header parse_header(std::string_view json, std::uint64_t data_bytes) {
  const std::size_t invalid = first_invalid_utf8(json);
  if (invalid != json.size()) {
    throw Error("header is not UTF-8 at byte " + number(kPrefixBytes + invalid) + kCorrupt);
  }
  Header header = Parser(json).header();
  header.data_offset = kPrefixBytes + json.size();
  std::vector<std::string_view> names;
  names.reserve(header.tensors.size());
  for (const TensorInfo& tensor : header.tensors) names.push_back(tensor.name);
  refuse_duplicates(names, "tensor");
  check_coverage(header.tensors, data_bytes);
  return header;
}

Header read_header(const File& file) {
  if (file.size() < kPrefixBytes) {
    throw Error("file has " + number(file.size()) + " bytes, expected at least 8; the download is "
                "incomplete or the file is not safetensors");
  }
  unsigned char prefix[kPrefixBytes];
  file.read(0, reinterpret_cast<char*>(prefix), kPrefixBytes);
  std::string json(header_bytes(prefix, file.size()), '\0');
  file.read(kPrefixBytes, json.data(), json.size());
  return parse_header(json, file.size() - kPrefixBytes - json.size());
}

}  // namespace fastsafe
