/* SPDX-License-Identifier: Apache-2.0
 *
 * libFuzzer's entry: an input is a description of a device, of memory, and a script of what the driver does. Bytes of zero
 * mean the ordinary thing, so that an input of few bytes is a valid exchange and every other byte is one deviation.
 */
#include <stddef.h>
#include <string.h>

#include "fuzz_world.h"

#define SCRIPT_STEPS_MAX 48u
#define PIECES_MAX 40u
#define TABLE_BYTES_MAX (PIECES_MAX * 16u)

#define DESC_IOVA 0x10000u
#define AVAIL_IOVA 0x20000u
#define USED_IOVA 0x30000u
#define TABLE_IOVA 0x40000u
#define DATA_IOVA 0x100000u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int fuzz_queue_begin(struct vf_queue *q, uint16_t state);

static struct {
	uint32_t size;
	bool packed;
	uint8_t wrap_counter; /* packed: of next_desc */
	uint16_t avail_idx;
	uint16_t next_desc;
	uint64_t data_iova[6]; /* starts of the data regions */
} driver;

struct piece {
	uint64_t iova;
	uint32_t len;
	uint16_t flags;
};

static struct piece pieces[PIECES_MAX];
static uint32_t piece_count;

/* Memory: ring areas, a table area in two halves, and data regions, some of them adjacent, one at the top of the address space. */
static void driver_map(uint8_t bits)
{
	static const uint32_t lens[] = { 2048, 4096, 512, 1024, 1536, 33, 16, 1 };
	static const uint32_t perms[] = { VF_PERM_RW, VF_PERM_RO, VF_PERM_WO, VF_PERM_RW };
	uint32_t size = driver.size;
	uint32_t skew = bits & 1u ? fuzz_u8() % 16u : 0; /* misaligned in the process, aligned in the IOVA space */
	uint64_t at = DATA_IOVA;

	fuzz_region_add(DESC_IOVA - skew, size * 16u + skew, driver.packed ? VF_PERM_RW : VF_PERM_RO);
	fuzz_region_add(AVAIL_IOVA, driver.packed ? 4u : 6u + 2u * size, VF_PERM_RO);
	fuzz_region_add(USED_IOVA, driver.packed ? 4u : 6u + 8u * size, VF_PERM_RW);
	fuzz_region_add(TABLE_IOVA, TABLE_BYTES_MAX / 2u + 8u, VF_PERM_RO);
	fuzz_region_add(TABLE_IOVA + TABLE_BYTES_MAX / 2u + 8u, TABLE_BYTES_MAX, VF_PERM_RO);
	for (uint32_t i = 0; i < 5u; i++) {
		uint8_t how = fuzz_u8();

		driver.data_iova[i] = at;
		fuzz_region_add(at, lens[how & 7u], perms[how >> 3 & 3u]);
		at += lens[how & 7u] + (how & 32u ? 0x1000u : 0u);
	}
	driver.data_iova[5] = UINT64_MAX - 1023u;
	fuzz_region_add(UINT64_MAX - 1023u, 1024u, VF_PERM_RW);
}

static void driver_write_u16(uint64_t iova, uint16_t value)
{
	fuzz_write(iova, &value, sizeof(value));
}

/* Cut len bytes at iova into descriptors; 0: in one piece. Bit 5 leaves gaps between them, so that they stay pieces. */
static void driver_cut(uint64_t iova, uint32_t len, uint16_t flags, uint8_t cut)
{
	uint32_t step = cut ? 1u + cut % 64u * (cut & 64u ? 16u : 1u) : UINT32_MAX;

	if (cut & 128u && piece_count < PIECES_MAX)
		pieces[piece_count++] = (struct piece){ .iova = iova, .len = 0, .flags = flags };
	do {
		uint32_t n = len < step || piece_count + 4u >= PIECES_MAX ? len : step;

		if (piece_count == PIECES_MAX)
			return;
		pieces[piece_count++] = (struct piece){ .iova = iova, .len = n, .flags = flags };
		iova += n + (cut >> 5 & 1u);
		len -= n;
	} while (len);
}

static uint64_t driver_sector(uint8_t how)
{
	switch (how & 7u) {
	case 0:
		return how >> 3;
	case 1:
		return FUZZ_CAPACITY_SECTORS;
	case 2:
		return FUZZ_CAPACITY_SECTORS - 1u;
	case 3:
		return UINT64_MAX;
	case 4:
		return UINT64_MAX / 512u + (how >> 3) - 8u;
	case 5:
		return (how >> 3) * 8u;
	default:
		return fuzz_u64();
	}
}

static uint64_t driver_address(uint8_t how)
{
	return driver.data_iova[how % 6u] + (uint64_t)(how / 6u) * 64u;
}

static void driver_write_ranges(uint64_t iova, uint32_t count, uint8_t how)
{
	for (uint32_t i = 0; i < count; i++) {
		struct vf_blk_range range = { .sector = i, .num_sectors = 1, .flags = 0 };

		if (how) {
			uint8_t bits = fuzz_u8();

			range.sector = driver_sector(bits);
			range.num_sectors = bits & 64u ? fuzz_u32() : (uint32_t)(bits & 3u);
			range.flags = how & 1u ? fuzz_u8() & 3u : how >> 1;
		}
		fuzz_write(iova + i * sizeof(range), &range, sizeof(range));
	}
}

/* The pieces of one request: what the device reads, then what it writes. */
static void driver_make_pieces(uint8_t kind)
{
	static const uint32_t types[] = { VF_BLK_T_IN,	    VF_BLK_T_OUT,	   VF_BLK_T_FLUSH, VF_BLK_T_GET_ID,
					  VF_BLK_T_DISCARD, VF_BLK_T_WRITE_ZEROES, 1u,		   0x80000000u };
	static const uint32_t sizes[] = { 512, 1024, 2048, 4096, 0, 513, 8192, 20 };
	struct vf_blk_header header = { .type = types[kind & 7u] };
	uint32_t data = sizes[kind >> 3 & 7u], ranges = 1u + (kind >> 3 & 3u), readable = 16, writable = 1;
	uint8_t place = fuzz_u8(), cut_in = fuzz_u8(), cut_out = fuzz_u8();
	/* Unless told otherwise all of it lies in one region, as in the kernel's bounce pages. */
	uint64_t from = driver_address(place), to = place ? driver_address(fuzz_u8()) : from + 1024u;

	header.sector = driver_sector(fuzz_u8());
	fuzz_write(from, &header, sizeof(header));
	if (header.type == VF_BLK_T_OUT) {
		readable += data;
	} else if (header.type == VF_BLK_T_IN) {
		writable += data;
	} else if (header.type == VF_BLK_T_GET_ID) {
		writable += data == 512u ? VF_BLK_ID_BYTES : data % 32u;
	} else if (header.type == VF_BLK_T_DISCARD || header.type == VF_BLK_T_WRITE_ZEROES) {
		readable += ranges * 16u;
		driver_write_ranges(from + 16u, ranges, fuzz_u8());
	}
	if (kind & 64u) { /* lengths that are wrong */
		readable += fuzz_u8() - 16u;
		writable += fuzz_u8() - 1u;
	}
	piece_count = 0;
	if (kind & 128u) { /* out of order, or without a status */
		driver_cut(to, writable, VF_DESC_F_WRITE, cut_out);
		if (cut_in != 1u)
			driver_cut(from, readable, 0, cut_in);
	} else {
		/* As drivers do it, unless told otherwise: header, data and status on their own. */
		bool apart_in = cut_in == 0 && readable % 65536u > 16u, apart_out = cut_out == 0 && writable % 65536u > 1u;

		driver_cut(from, apart_in ? 16u : readable % 65536u, 0, cut_in);
		if (apart_in)
			driver_cut(from + 16u, readable % 65536u - 16u, 0, cut_in);
		if (apart_out)
			driver_cut(to, writable % 65536u - 1u, VF_DESC_F_WRITE, cut_out);
		driver_cut(to + (apart_out ? writable % 65536u - 1u : 0), apart_out ? 1u : writable % 65536u, VF_DESC_F_WRITE, cut_out);
	}
}

/* Change one field of one descriptor of the chain to be. */
static void driver_twist(struct vf_desc *descs, uint32_t count)
{
	uint8_t how = fuzz_u8();
	struct vf_desc *desc = &descs[(how >> 3) % count];

	switch (how & 7u) {
	case 1:
		desc->flags ^= (uint16_t)(fuzz_u8() & 7u);
		break;
	case 2:
		desc->next = (uint16_t)(fuzz_u8() % (2u * driver.size));
		desc->flags |= VF_DESC_F_NEXT;
		break;
	case 3:
		desc->len = fuzz_u32();
		break;
	case 4:
		desc->addr = fuzz_u64();
		break;
	case 5:
		desc->addr = driver_address(fuzz_u8());
		break;
	case 6:
		desc->addr = UINT64_MAX - fuzz_u16();
		break;
	case 7:
		desc->next = fuzz_u16();
		break;
	default:
		break;
	}
}

/* Descriptors of a packed ring or table. available: they are in the ring, and end a chain that the device is to take. */
static void driver_put_packed(uint64_t table_iova, const struct vf_desc *descs, uint32_t first, uint32_t count,
			      uint32_t modulus, bool available)
{
	for (uint32_t i = 0; i < count; i++) {
		uint32_t slot = (first + i) % modulus;
		bool wrap_counter = driver.wrap_counter ^ ((first + i) / modulus & 1u);
		bool shown = available || i;
		struct vf_packed_desc desc = {
			.addr = descs[i].addr,
			.len = descs[i].len,
			.id = (uint16_t)first,
			.flags = (uint16_t)(descs[i].flags | (wrap_counter == shown ? VF_PACKED_DESC_F_AVAIL : VF_PACKED_DESC_F_USED)),
		};
		fuzz_write(table_iova + slot * sizeof(desc), &desc, sizeof(desc));
	}
}

static void driver_put_descs(uint64_t table_iova, const struct vf_desc *descs, uint32_t first, uint32_t count,
			     uint32_t modulus)
{
	for (uint32_t i = 0; i < count; i++)
		fuzz_write(table_iova + (first + i) % modulus * sizeof(*descs), &descs[i], sizeof(*descs));
}

static uint32_t driver_make_descs(struct vf_desc *descs, uint32_t from, uint32_t count, uint32_t first_slot,
				  uint32_t modulus)
{
	for (uint32_t i = 0; i < count; i++) {
		const struct piece *piece = &pieces[from + i];
		bool last = i + 1u == count;

		descs[i] = (struct vf_desc){
			.addr = piece->iova,
			.len = piece->len,
			.flags = (uint16_t)(piece->flags | (last ? 0u : VF_DESC_F_NEXT)),
			.next = last ? 0 : (uint16_t)((first_slot + i + 1u) % modulus),
		};
	}
	return count;
}

/* Bits of shape: 0 indirect; 1 one direct descriptor ahead of the table; 2 odd table address; 3 odd table length; 4 twist
 * the table; 5 twist the ring's descriptors; 6 do not make it available; 7 an avail entry of its own. */
static void driver_add_chain(void)
{
	uint8_t shape = fuzz_u8();
	struct vf_desc descs[PIECES_MAX], table[PIECES_MAX];
	uint32_t head = driver.next_desc, count, direct;

	driver_make_pieces(fuzz_u8());
	direct = shape & 1u ? (shape & 2u ? 1u : 0u) : piece_count;
	count = driver_make_descs(descs, 0, direct, head, driver.size);
	if (shape & 1u) {
		uint64_t iova = TABLE_IOVA + (shape & 4u ? 4u * fuzz_u8() : 0u);
		uint32_t in_table = driver_make_descs(table, direct, piece_count - direct, 0, PIECES_MAX);

		if (shape & 16u && in_table)
			driver_twist(table, in_table);
		if (driver.packed)
			driver_put_packed(iova, table, 0, in_table, PIECES_MAX, true);
		else
			driver_put_descs(iova, table, 0, in_table, PIECES_MAX);
		if (direct) {
			descs[0].flags |= VF_DESC_F_NEXT;
			descs[0].next = (uint16_t)((head + 1u) % driver.size);
		}
		descs[count++] = (struct vf_desc){
			.addr = iova,
			.len = in_table * 16u + (shape & 8u ? fuzz_u8() - 16u : 0u),
			.flags = VF_DESC_F_INDIRECT,
		};
	}
	if (shape & 32u)
		driver_twist(descs, count);
	if (driver.packed) {
		driver_put_packed(DESC_IOVA, descs, head, count, driver.size, !(shape & 64u));
		driver.wrap_counter ^= (head + count) / driver.size & 1u;
		driver.next_desc = (uint16_t)((head + count) % driver.size);
		return;
	}
	driver_put_descs(DESC_IOVA, descs, head, count, driver.size);
	driver.next_desc = (uint16_t)((head + count) % driver.size);
	if (shape & 64u)
		return;
	driver_write_u16(AVAIL_IOVA + 4u + 2u * (driver.avail_idx & (driver.size - 1u)),
			 shape & 128u ? fuzz_u16() : (uint16_t)head);
	driver_write_u16(AVAIL_IOVA + 2u, ++driver.avail_idx);
}

/* Drop a range, as UPDATE_IOTLB does, free its memory, and map the rings again. */
static void driver_invalidate(uint8_t how)
{
	struct fuzz_region gone = world.region[how % world.region_count];
	int err;

	fuzz_world_drain();
	if (!gone.mem)
		return;
	world.q->vring.mapped = 0;
	vf_iotlb_drop(&world.q->tlb, gone.start, gone.start);
	fuzz_region_remove(how % world.region_count);
	if (!(how & 128u) && world.region_count < FUZZ_REGION_MAX) {
		fuzz_region_add(gone.start, gone.len, gone.perm);
		if (!driver.packed) {
			driver_write_u16(AVAIL_IOVA + 2u, driver.avail_idx);
			driver_write_u16(USED_IOVA + 2u, world.q->vring.split.published_used_idx);
		}
	}
	err = vf_vring_map(&world.q->vring, &world.q->tlb);
	if (err)
		world.failed = true;
}

static void driver_arm(void)
{
	uint8_t how = fuzz_u8();
	uint32_t at = how & 3u;

	world.mutation[at].armed = true;
	world.mutation[at].where = how >> 2 & 3u;
	world.mutation[at].width = (uint8_t)(1u << (how >> 4 & 3u));
	world.mutation[at].region = (how >> 6 ? fuzz_u8() : 0u) % world.region_count;
	world.mutation[at].countdown = fuzz_u8();
	world.mutation[at].offset = fuzz_u16();
	world.mutation[at].value = how & 128u ? fuzz_u64() : fuzz_u8();
}

static void driver_poke(void)
{
	struct fuzz_region *region = &world.region[fuzz_u8() % world.region_count];
	uint16_t offset = fuzz_u16();
	uint32_t value = fuzz_u32();

	fuzz_write(region->start + offset % region->len, &value, sizeof(value));
}

static void driver_step(uint8_t step)
{
	switch (step % 10u) {
	case 0:
	case 1:
		driver_add_chain();
		break;
	case 2:
	case 3:
		fuzz_world_round();
		break;
	case 4:
		driver_arm();
		break;
	case 5:
		driver_poke();
		break;
	case 6: /* as loop_sleep and its waking do; or the worker dies */
		if (step & 128u) {
			fuzz_world_crash();
			break;
		}
		vf_vring_kick_enable(&world.q->vring);
		vf_vring_kick_disable(&world.q->vring);
		break;
	case 7:
		driver_invalidate(fuzz_u8());
		break;
	case 8:
		if (driver.packed) { /* flags of whatever slot */
			driver_write_u16(DESC_IOVA + fuzz_u8() % driver.size * 16u + 14u, fuzz_u16());
			break;
		}
		driver.avail_idx = (uint16_t)(driver.avail_idx + fuzz_u8());
		driver_write_u16(AVAIL_IOVA + 2u, driver.avail_idx);
		break;
	default:
		if (driver.packed) {
			driver_write_u16(AVAIL_IOVA, fuzz_u16());
			driver_write_u16(AVAIL_IOVA + 2u, fuzz_u8() & 3u);
			fuzz_world_drain();
			break;
		}
		driver_write_u16(AVAIL_IOVA, fuzz_u8() & 1u);
		driver_write_u16(AVAIL_IOVA + 4u + 2u * driver.size, (uint16_t)(driver.avail_idx + fuzz_u8() - 1u));
		fuzz_world_drain();
		break;
	}
}

/* Set up and start as Queue.start() does. False: the rings were refused. */
static bool driver_start(uint8_t bits, uint8_t format)
{
	static const uint32_t sizes[] = { 0, 1, 4, 16 };
	struct vf_queue *q = world.q;
	uint64_t features = 0;
	uint16_t start_idx = bits & 16u ? (uint16_t)(fuzz_u8() - 8u) : 0;

	driver.packed = format & 1u;
	driver.size = sizes[bits & 3u] ? sizes[bits & 3u] : q->queue_size; /* also more than was offered */
	driver.size -= driver.packed && bits & 32u && driver.size > 1u; /* a packed ring may have any size */
	driver.avail_idx = start_idx;
	driver.next_desc = 0;
	driver.wrap_counter = 1;
	features |= driver.packed ? 1ull << VF_F_RING_PACKED : 0;
	features |= format & 2u ? 1ull << VF_F_IN_ORDER : 0;
	features |= bits & 4u ? 0 : 1ull << VF_RING_F_EVENT_IDX;
	features |= bits & 8u ? 0 : 1ull << VF_RING_F_INDIRECT_DESC;
	if (vf_vring_setup(&q->vring, features, driver.size - (bits == 253u), DESC_IOVA + (bits == 255u),
			   bits == 254u ? UINT64_MAX - 3u : AVAIL_IOVA, USED_IOVA, q->inflight, q->inflight_log) ||
	    vf_queue_fit(q, driver.size))
		return false;
	driver_map(bits >> 5);
	if (vf_vring_map(&q->vring, &q->tlb))
		return false;
	if (driver.packed) {
		/* As a driver finds it: at some slot of either lap. */
		driver.next_desc = (uint16_t)(start_idx % driver.size);
		driver.wrap_counter = (start_idx >> 8 & 1u) ^ 1u;
		return fuzz_queue_begin(q, vf_packed_position(driver.next_desc, driver.wrap_counter)) == 0;
	}
	driver_write_u16(AVAIL_IOVA + 2u, start_idx);
	driver_write_u16(USED_IOVA + 2u, start_idx);
	return fuzz_queue_begin(q, start_idx) == 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	fuzz_input_set(data, size);
	uint8_t which = fuzz_u8();

	fuzz_world_open(which, fuzz_u8());
	world.async = (which & 8u) != 0;
	world.error_every = which & 16u ? 3u : 0u;
	world.irq_fail_every = which & 32u ? 2u : 0u;
	world.random = which >> 6;
	if (driver_start(fuzz_u8(), which >> 6)) {
		for (uint32_t steps = 0; steps < SCRIPT_STEPS_MAX && fuzz_input_left() && !world.failed; steps++)
			driver_step(fuzz_u8());
		if (!world.failed)
			fuzz_world_round();
	}
	fuzz_world_close();
	return 0;
}
