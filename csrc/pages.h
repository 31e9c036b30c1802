// How much the operating system is asked for at once.
#pragma once

#include <cstddef>

namespace pixnerd {

// Asks Linux to back a large block by huge pages, before it is touched for the first time: a new block then costs a
// page fault for 2 MiB, not for 4 KiB. Does nothing for small blocks, elsewhere, or with PIXNERD_HUGE_PAGES=0; what
// the system does with the advice is its own affair (/sys/kernel/mm/transparent_hugepage/enabled).
void advise_huge_pages(void* address, std::size_t bytes);

}  // namespace pixnerd
