# cython: language_level=3
"""libibverbs as this package uses it: extern declarations only."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "infiniband/verbs.h" nogil:
    enum ibv_wr_opcode:
        IBV_WR_RDMA_WRITE
        IBV_WR_RDMA_WRITE_WITH_IMM
        IBV_WR_SEND
        IBV_WR_SEND_WITH_IMM
        IBV_WR_RDMA_READ
        IBV_WR_ATOMIC_CMP_AND_SWP
        IBV_WR_ATOMIC_FETCH_AND_ADD
        IBV_WR_LOCAL_INV
        IBV_WR_BIND_MW
    enum ibv_wc_status:
        IBV_WC_SUCCESS
    enum ibv_qp_type:
        IBV_QPT_RC
    enum ibv_qp_state:
        IBV_QPS_RESET
        IBV_QPS_INIT
        IBV_QPS_RTR
        IBV_QPS_RTS
        IBV_QPS_ERR
    enum ibv_mtu:
        pass
    enum ibv_mw_type:
        IBV_MW_TYPE_1
        IBV_MW_TYPE_2
    enum ibv_event_type:
        pass
    enum:
        IBV_SEND_SIGNALED
        IBV_SEND_INLINE
        IBV_ACCESS_ON_DEMAND
        IBV_QP_STATE
        IBV_QP_CAP
        IBV_QP_PKEY_INDEX
        IBV_QP_PORT
        IBV_QP_ACCESS_FLAGS
        IBV_QP_AV
        IBV_QP_PATH_MTU
        IBV_QP_DEST_QPN
        IBV_QP_RQ_PSN
        IBV_QP_MAX_DEST_RD_ATOMIC
        IBV_QP_MIN_RNR_TIMER
        IBV_QP_TIMEOUT
        IBV_QP_RETRY_CNT
        IBV_QP_RNR_RETRY
        IBV_QP_SQ_PSN
        IBV_QP_MAX_QP_RD_ATOMIC
        IBV_REREG_MR_CHANGE_ACCESS
        IBV_WC_WITH_IMM
        IBV_ODP_SUPPORT

    union ibv_gid:
        uint8_t raw[16]
    struct ibv_device:
        char name[64]
    struct ibv_context:
        ibv_device *device
        int cmd_fd
        int async_fd
    struct ibv_pd:
        ibv_context *context
        uint32_t handle
    struct ibv_mr:
        ibv_context *context
        ibv_pd *pd
        void *addr
        size_t length
        uint32_t handle, lkey, rkey
    struct ibv_mw:
        uint32_t rkey
    struct ibv_cq:
        ibv_context *context
        uint32_t handle
        int cqe
    struct ibv_qp:
        ibv_context *context
        ibv_pd *pd
        ibv_cq *send_cq
        ibv_cq *recv_cq
        uint32_t handle, qp_num
        ibv_qp_state state
    struct ibv_sge:
        uint64_t addr
        uint32_t length, lkey
    struct ibv_mw_bind_info:
        ibv_mr *mr
        uint64_t addr, length
        unsigned int mw_access_flags
    struct ibv_mw_bind:
        uint64_t wr_id
        unsigned int send_flags
        ibv_mw_bind_info bind_info
    struct ibv_send_wr:
        uint64_t wr_id
        ibv_send_wr *next
        ibv_sge *sg_list
        int num_sge
        ibv_wr_opcode opcode
        unsigned int send_flags
        uint32_t imm_data
        uint32_t invalidate_rkey
    struct ibv_recv_wr:
        uint64_t wr_id
        ibv_recv_wr *next
        ibv_sge *sg_list
        int num_sge
    struct ibv_wc:
        uint64_t wr_id
        ibv_wc_status status
        int opcode
        uint32_t vendor_err, byte_len, imm_data, qp_num, wc_flags
    struct ibv_qp_cap:
        uint32_t max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data
    struct ibv_qp_init_attr:
        ibv_cq *send_cq
        ibv_cq *recv_cq
        ibv_qp_cap cap
        ibv_qp_type qp_type
        int sq_sig_all
    struct ibv_global_route:
        ibv_gid dgid
        uint8_t sgid_index, hop_limit
    struct ibv_ah_attr:
        ibv_global_route grh
        uint16_t dlid
        uint8_t is_global, port_num
    struct ibv_qp_attr:
        ibv_qp_state qp_state
        ibv_mtu path_mtu
        uint32_t rq_psn, sq_psn, dest_qp_num
        unsigned int qp_access_flags
        ibv_qp_cap cap
        ibv_ah_attr ah_attr
        uint8_t max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry
    struct ibv_port_attr:
        int state
        ibv_mtu active_mtu
        int gid_tbl_len
        uint32_t max_msg_sz
        uint16_t lid
        uint8_t link_layer
    struct ibv_device_attr:
        char fw_ver[64]
        uint64_t max_mr_size, page_size_cap
        int max_qp, max_qp_wr, max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd, max_mw, max_qp_rd_atom, atomic_cap
        unsigned int device_cap_flags
    struct ibv_odp_caps:
        uint64_t general_caps
    struct ibv_device_attr_ex:
        ibv_device_attr orig_attr
        ibv_odp_caps odp_caps
    struct ibv_async_event:
        ibv_event_type event_type

    ibv_device **ibv_get_device_list(int *)
    void ibv_free_device_list(ibv_device **)
    const char *ibv_get_device_name(ibv_device *)
    ibv_context *ibv_open_device(ibv_device *)
    int ibv_close_device(ibv_context *)
    int ibv_query_device_ex(ibv_context *, const void *, ibv_device_attr_ex *)
    int ibv_query_port(ibv_context *, uint8_t, ibv_port_attr *)
    int ibv_query_gid(ibv_context *, uint8_t, int, ibv_gid *)
    ibv_pd *ibv_alloc_pd(ibv_context *)
    int ibv_dealloc_pd(ibv_pd *)
    ibv_mr *ibv_reg_mr(ibv_pd *, void *, size_t, unsigned int)
    ibv_mr *ibv_reg_mr_iova2(ibv_pd *, void *, size_t, uint64_t, unsigned int)
    int ibv_rereg_mr(ibv_mr *, int, ibv_pd *, void *, size_t, int)
    int ibv_dereg_mr(ibv_mr *)
    ibv_mw *ibv_alloc_mw(ibv_pd *, ibv_mw_type)
    int ibv_dealloc_mw(ibv_mw *)
    int ibv_bind_mw(ibv_qp *, ibv_mw *, ibv_mw_bind *)
    uint32_t ibv_inc_rkey(uint32_t)
    ibv_cq *ibv_create_cq(ibv_context *, int, void *, void *, int)
    int ibv_destroy_cq(ibv_cq *)
    int ibv_poll_cq(ibv_cq *, int, ibv_wc *)
    ibv_qp *ibv_create_qp(ibv_pd *, ibv_qp_init_attr *)
    int ibv_destroy_qp(ibv_qp *)
    int ibv_modify_qp(ibv_qp *, ibv_qp_attr *, int)
    int ibv_query_qp(ibv_qp *, ibv_qp_attr *, int, ibv_qp_init_attr *)
    int ibv_post_send(ibv_qp *, ibv_send_wr *, ibv_send_wr **)
    int ibv_post_recv(ibv_qp *, ibv_recv_wr *, ibv_recv_wr **)
    int ibv_get_async_event(ibv_context *, ibv_async_event *)
    void ibv_ack_async_event(ibv_async_event *)
    const char *ibv_wc_status_str(ibv_wc_status)
    const char *ibv_event_type_str(ibv_event_type)

# members of unions, which Cython cannot name
cdef extern from *:
    """
    #include <infiniband/verbs.h>
    static inline void wr_remote(struct ibv_send_wr *w, uint64_t addr, uint32_t rkey)
    { w->wr.rdma.remote_addr = addr; w->wr.rdma.rkey = rkey; }
    static inline void wr_atomic(struct ibv_send_wr *w, uint64_t addr, uint32_t rkey, uint64_t first, uint64_t second)
    { w->wr.atomic.remote_addr = addr; w->wr.atomic.rkey = rkey; w->wr.atomic.compare_add = first; w->wr.atomic.swap =
    second; } static inline void wr_bind(struct ibv_send_wr *w, struct ibv_mw *mw, uint32_t rkey, struct ibv_mr *mr, uint64_t
    addr,
                               uint64_t len, unsigned access)
    { w->bind_mw.mw = mw; w->bind_mw.rkey = rkey; w->bind_mw.bind_info.mr = mr; w->bind_mw.bind_info.addr = addr;
      w->bind_mw.bind_info.length = len; w->bind_mw.bind_info.mw_access_flags = access; }
    static inline uint64_t wr_remote_addr(const struct ibv_send_wr *w) { return w->wr.rdma.remote_addr; }
    static inline uint32_t wr_rkey(const struct ibv_send_wr *w)
    { return w->opcode == IBV_WR_ATOMIC_CMP_AND_SWP || w->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD ? w->wr.atomic.rkey :
    w->wr.rdma.rkey; } static inline void wr_imm(struct ibv_send_wr *w, uint32_t imm) { w->imm_data = htobe32(imm); }
    static inline uint32_t wc_imm(const struct ibv_wc *w) { return be32toh(w->imm_data); }
    """
    void wr_remote(ibv_send_wr *, uint64_t, uint32_t) noexcept nogil
    void wr_atomic(ibv_send_wr *, uint64_t, uint32_t, uint64_t, uint64_t) noexcept nogil
    void wr_bind(ibv_send_wr *, ibv_mw *, uint32_t, ibv_mr *, uint64_t, uint64_t, unsigned int) noexcept nogil
    uint64_t wr_remote_addr(const ibv_send_wr *) noexcept nogil
    uint32_t wr_rkey(const ibv_send_wr *) noexcept nogil
    void wr_imm(ibv_send_wr *, uint32_t) noexcept nogil
    uint32_t wc_imm(const ibv_wc *) noexcept nogil
