#include "safetensors.hpp"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <functional>
#include <system_error>
#include <tuple>

namespace fastsafe {
namespace {

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
  constexpr const char* kHex = "0123456789abcdef";
  std::string out = "'";
  for (const unsigned char c : text.substr(0, kShown)) {
    if (c < 0x20 || c > 0x7e) out += {'\\', 'x', kHex[c >> 4], kHex[c & 15]};
    else out += static_cast<char>(c);
  }
  return out + (text.size() > kShown ? "...'" : "'");
}

[[noreturn]] void refuse(const std::string& got, const std::string& expected) {
  throw Error(got + ", expected " + expected +
              "; the file is corrupt or beyond what fastsafe reads, download or write it again");
}

[[noreturn]] void refuse(const TensorInfo& which, const std::string& got, const std::string& want) {
  refuse("tensor " + quote(which.name) + " " + got, want);
}

// Returns the offset of the first byte that is not UTF-8, or text.size().
std::size_t first_invalid_utf8(std::string_view text) {
  const auto* s = reinterpret_cast<const unsigned char*>(text.data());
  const std::size_t n = text.size();
  for (std::size_t i = 0; i < n;) {
    std::uint64_t word = ~std::uint64_t{0};
    if (n - i >= sizeof word) std::memcpy(&word, s + i, sizeof word);
    if ((word & 0x8080808080808080u) == 0) {  // eight ASCII bytes at once
      i += sizeof word;
      continue;
    }
    const unsigned char c = s[i];
    const std::size_t tail =
        c < 0x80 ? 0 : c < 0xc2 || c > 0xf4 ? n : c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3;
    if (tail >= n - i) return i;
    for (std::size_t k = 1; k <= tail; ++k) {
      if ((s[i + k] & 0xc0) != 0x80) return i;
    }
    // overlong forms, surrogates, and code points beyond U+10FFFF
    if (tail > 1 && ((c == 0xe0 && s[i + 1] < 0xa0) || (c == 0xed && s[i + 1] > 0x9f) ||
                     (c == 0xf0 && s[i + 1] < 0x90) || (c == 0xf4 && s[i + 1] > 0x8f))) {
      return i;
    }
    i += 1 + tail;
  }
  return n;
}

void append_utf8(std::string& out, std::uint32_t point) {
  const int tail = point < 0x80 ? 0 : point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
  constexpr unsigned char kLead[] = {0, 0xc0, 0xe0, 0xf0};
  out += static_cast<char>(kLead[tail] | (point >> (6 * tail)));
  for (int i = tail - 1; i >= 0; --i) out += static_cast<char>(0x80 | ((point >> 6 * i) & 0x3f));
}

// Control characters (C0, DEL, C1) and marks that reorder text on a screen.
bool has_control_character(std::string_view name) {
  for (std::size_t i = 0; i < name.size(); ++i) {
    const auto at = [&](std::size_t k) -> unsigned {
      return i + k < name.size() ? static_cast<unsigned char>(name[i + k]) : 0;
    };
    const unsigned c = at(0), d = at(1), e = at(2);
    if (c < 0x20 || c == 0x7f || (c == 0xc2 && d < 0xa0)) return true;
    if (c == 0xe2 && d == 0x80 && (e == 0x8e || e == 0x8f || (e >= 0xaa && e <= 0xae))) return true;
    if (c == 0xe2 && d == 0x81 && e >= 0xa6 && e <= 0xa9) return true;
  }
  return false;
}

// It sorts: unlike a hash table, no choice of names makes it slow.
void refuse_duplicates(const std::vector<std::string_view>& names, const char* what) {
  std::vector<std::pair<std::size_t, std::string_view>> sorted;
  sorted.reserve(names.size());
  for (const auto name : names) sorted.emplace_back(std::hash<std::string_view>{}(name), name);
  std::sort(sorted.begin(), sorted.end());
  const auto twin = std::adjacent_find(sorted.begin(), sorted.end());
  if (twin != sorted.end()) refuse(what + (" " + quote(twin->second)) + " appears twice", "once");
}

void check_size(const TensorInfo& tensor) {
  std::uint64_t bits = tensor.dtype->bits;
  std::string type(tensor.dtype->name);
  bool is_empty = false, overflows = false;
  for (std::size_t i = 0; i < tensor.rank; ++i) {
    // a zero must not hide an overflow of the other dimensions
    is_empty = is_empty || tensor.shape[i] == 0;
    overflows |= __builtin_mul_overflow(bits, std::max<std::uint64_t>(1, tensor.shape[i]), &bits);
  }
  if (is_empty) bits = 0;
  const std::uint64_t bytes = tensor.end - tensor.begin;
  if (!overflows && bits % 8 == 0 && bytes == bits / 8) return;
  for (std::size_t i = 0; i < tensor.rank; ++i) type += (i ? ", " : " [") + number(tensor.shape[i]);
  type += tensor.rank ? "]" : " []";
  if (overflows) refuse(tensor, "is " + type, "fewer than 2^64 bits");
  if (bits % 8) refuse(tensor, "is " + type + " of " + number(bits) + " bits", "whole bytes");
  refuse(tensor, "has " + number(bytes) + " bytes", number(bits / 8) + " for " + type);
}

// It does not recurse: a header has three fixed levels, and unknown keys are refused, so it never has
// to skip a value of unknown shape.
class Parser {
 public:
  explicit Parser(std::string_view text)
      : start_(text.data()), at_(text.data()), end_(text.data() + text.size()) {}

  Header header() {
    Header header;
    bool has_metadata = false;
    for (bool more = opens('{', '}'); more; more = continues('}')) {
      std::string name = string(kMaxNameBytes, "name of a tensor");
      expect(':');
      if (name == "__metadata__") {
        if (has_metadata) refuse("__metadata__ appears twice", "once");
        has_metadata = true;
        metadata(header.metadata);
        continue;
      }
      if (header.tensors.size() == kMaxTensors) {
        refuse("header lists too many tensors", "at most " + number(kMaxTensors));
      }
      tensor_ = &header.tensors.emplace_back();
      tensor_->name = std::move(name);
      info(*tensor_);
      tensor_ = nullptr;
    }
    skip_space();
    if (at_ != end_) malformed("the end of the header, padded with nothing but spaces");
    return header;
  }

 private:
  [[noreturn]] void malformed(const std::string& expected) const {
    const auto offset = kPrefixBytes + static_cast<std::uint64_t>(at_ - start_);
    const std::string where = tensor_ ? " in tensor " + quote(tensor_->name) : "";
    const std::string found = at_ == end_ ? "its end" : *at_ ? quote({at_, 1}) : "NUL";
    refuse("header has " + found + " at byte " + number(offset) + where, expected);
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

  // Consumes an opening bracket and returns whether an element follows; if not, consumes the closing
  // one, too.
  bool opens(char bracket, char closing) {
    if (peek() != bracket) malformed(quote({&bracket, 1}));
    ++at_;
    skip_space();
    if (peek() != closing) return true;
    ++at_;
    return false;
  }

  // After an element: consumes a comma and returns true, or consumes the closing bracket.
  bool continues(char closing) {
    skip_space();
    const char c = peek();
    if (c != ',' && c != closing) malformed("',' or " + quote({&closing, 1}));
    ++at_;
    if (c == ',') skip_space();
    return c == ',';
  }

  std::uint32_t hex4() {
    std::uint32_t value = 0;
    if (end_ - at_ < 4 || std::from_chars(at_, at_ + 4, value, 16).ptr != at_ + 4) {
      malformed("four hexadecimal digits");
    }
    at_ += 4;
    return value;
  }

  void escape(std::string& out) {
    constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    const std::size_t i = kFrom.find(peek());
    if (i == std::string_view::npos && peek() != 'u') malformed("a JSON escape");
    ++at_;
    if (i != std::string_view::npos) {
      out += kTo[i];
      return;
    }
    std::uint32_t point = hex4();
    if (point >= 0xd800 && point <= 0xdfff) {
      const bool pairs = point < 0xdc00 && end_ - at_ >= 2 && at_[0] == '\\' && at_[1] == 'u';
      if (pairs) at_ += 2;
      const std::uint32_t low = pairs ? hex4() : 0;
      if (low < 0xdc00 || low > 0xdfff) malformed("a pair of surrogates");
      point = 0x10000 + ((point - 0xd800) << 10) + (low - 0xdc00);
    }
    append_utf8(out, point);
  }

  std::string string(std::size_t max_bytes, const char* what) {
    if (peek() != '"') malformed(std::string("a string, the ") + what);
    ++at_;
    for (std::string out;; escape(out)) {
      const char* run = at_;
      const auto is_plain = [](char c) {
        return c != '"' && c != '\\' && static_cast<unsigned char>(c) >= 0x20;
      };
      at_ = std::find_if_not(at_, end_, is_plain);
      if (out.size() + static_cast<std::size_t>(at_ - run) > max_bytes) {
        refuse(std::string(what) + " is too long", "at most " + number(max_bytes) + " bytes");
      }
      out.append(run, at_);
      const char c = peek();
      if (c != '"' && c != '\\') malformed("a printable character or the end of a string");
      ++at_;
      if (c == '"') return out;
    }
  }

  std::uint64_t integer(const char* what) {
    std::uint64_t value = 0;
    const auto [next, code] = std::from_chars(at_, end_, value);
    const std::string_view digits(at_, static_cast<std::size_t>(next - at_));
    const bool is_float = next != end_ && (*next == '.' || *next == 'e' || *next == 'E');
    if (digits.empty() || is_float || (digits.size() > 1 && digits[0] == '0')) {
      malformed(std::string("a whole number, the ") + what);
    }
    if (code != std::errc()) refuse(*tensor_, what + (" is " + quote(digits)), "less than 2^64");
    return at_ = next, value;
  }

  void metadata(std::vector<std::pair<std::string, std::string>>& entries) {
    if (end_ - at_ >= 4 && std::equal(at_, at_ + 4, "null")) return void(at_ += 4);  // as if absent
    std::size_t budget = kMaxMetadataBytes;
    for (bool more = opens('{', '}'); more; more = continues('}')) {
      auto& [key, value] = entries.emplace_back();
      key = string(budget, "key in __metadata__");
      budget -= key.size();
      expect(':');
      value = string(budget, "value in __metadata__");
      budget -= value.size();
    }
    std::vector<std::string_view> keys;
    for (const auto& entry : entries) keys.push_back(entry.first);
    refuse_duplicates(keys, "__metadata__ key");
  }

  void info(TensorInfo& tensor) {
    if (tensor.name.empty()) refuse("name of a tensor is empty", "text");
    if (has_control_character(tensor.name)) {
      refuse(tensor, "has a control character in its name", "printable text");
    }
    bool has_shape = false, has_offsets = false;
    for (bool more = opens('{', '}'); more; more = continues('}')) {
      const std::string key = string(kMaxNameBytes, "key of a tensor");
      expect(':');
      if (key == "dtype" && !tensor.dtype) {
        dtype(tensor);
      } else if (key == "shape" && !std::exchange(has_shape, true)) {
        shape(tensor);
      } else if (key == "data_offsets" && !std::exchange(has_offsets, true)) {
        offsets(tensor);
      } else {
        refuse(tensor, "has an unknown key or one twice, " + quote(key),
               "dtype, shape and data_offsets");
      }
    }
    if (!tensor.dtype || !has_shape || !has_offsets) {
      const char* missing = !tensor.dtype ? "dtype" : !has_shape ? "shape" : "data_offsets";
      refuse(tensor, std::string("has no ") + missing, "dtype, shape and data_offsets");
    }
    check_size(tensor);
  }

  void dtype(TensorInfo& tensor) {
    const std::string name = string(kMaxNameBytes, "dtype");
    const auto found = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                    [&](const Dtype& dtype) { return dtype.name == name; });
    if (found == std::end(kDtypes)) refuse(tensor, "has dtype " + quote(name), "one such as 'F32'");
    tensor.dtype = found;
  }

  void shape(TensorInfo& tensor) {
    for (bool more = opens('[', ']'); more; more = continues(']')) {
      const std::uint64_t dim = integer("dimension");
      if (dim > kMaxDim) refuse(tensor, "has a dimension of " + number(dim), "at most 2^48");
      if (tensor.rank == kMaxRank) {
        refuse(tensor, "has too many dimensions", "at most " + number(kMaxRank));
      }
      tensor.shape[tensor.rank++] = dim;
    }
  }

  void offsets(TensorInfo& tensor) {
    opens('[', ']');
    tensor.begin = integer("offset");
    expect(',');
    tensor.end = integer("offset");
    if (continues(']')) malformed("two offsets");
    if (tensor.end < tensor.begin) {
      refuse(tensor, "ends at byte " + number(tensor.end), "at least " + number(tensor.begin));
    }
  }

  const char* start_;
  const char* at_;
  const char* end_;
  TensorInfo* tensor_ = nullptr;  // the tensor being parsed, for messages
};

// Checks that tensors cover the data without gap or overlap, to the last byte of the file.
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
      const char* flaw = tensor.begin > covered ? " after a hole" : " in an overlap";
      refuse(tensor, "begins at byte " + number(tensor.begin) + " of the data" + flaw,
             number(covered) + ", where the data before it ends");
    }
    covered = tensor.end;
  }
  if (covered == data_bytes) return;
  throw Error("file has " + number(data_bytes) + " bytes of data, expected " + number(covered) +
              (covered > data_bytes ? "; the download is incomplete, repeat it"
                                    : "; something was appended, download or write it again"));
}

}  // namespace

std::uint64_t header_bytes(const unsigned char prefix[kPrefixBytes], std::uint64_t file_bytes) {
  std::uint64_t length = 0;
  for (int i = 7; i >= 0 && file_bytes >= kPrefixBytes; --i) length = length << 8 | prefix[i];
  if (length > kMaxHeaderBytes) {
    throw Error("header length is " + number(length) + ", expected at most " +
                number(kMaxHeaderBytes) + "; the file is not safetensors or is corrupt");
  }
  if (file_bytes < kPrefixBytes + length) {
    throw Error("file has " + number(file_bytes) + " bytes, expected at least " +
                number(kPrefixBytes + length) +
                " for its header; the download is incomplete or the file is not safetensors");
  }
  return length;
}

Header parse_header(std::string_view json, std::uint64_t data_bytes) {
  const std::size_t invalid = first_invalid_utf8(json);
  if (invalid != json.size()) {
    refuse("header is not text at byte " + number(kPrefixBytes + invalid), "UTF-8");
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
  unsigned char prefix[kPrefixBytes] = {};
  file.read(0, reinterpret_cast<char*>(prefix), std::min(kPrefixBytes, file.size()));
  std::string json(header_bytes(prefix, file.size()), '\0');
  file.read(kPrefixBytes, json.data(), json.size());
  return parse_header(json, file.size() - kPrefixBytes - json.size());
}

}  // namespace fastsafe
