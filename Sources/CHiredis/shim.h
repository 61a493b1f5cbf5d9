#ifndef SMAP_CHIREDIS_SHIM_H
#define SMAP_CHIREDIS_SHIM_H

#include <hiredis/hiredis.h>

#endif
