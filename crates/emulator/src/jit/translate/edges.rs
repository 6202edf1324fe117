//! Between the parts of a region: entries, joins, exits, and the ways to handlers and back.

use iced_x86::{Instruction, Mnemonic};

use super::{At, Cold, Flags, Miss, StackMiss, Translator};
use crate::jit::assembler::{ADDRESS, Assembler, GUEST_RSP, Jump, RCX, RSP, SCRATCH};
use crate::jit::call::Call;
use crate::jit::frame::slot;
use crate::jit::vectors::{FULL, SSE, X87};

impl Translator<'_> {
    /// Where an entry begins: looks whether anything has come up, and makes vector state live.
    pub(super) fn enter(&mut self, part: usize) {
        let (rip, count) = (self.region.parts[part].block.rip, self.region.parts[part].block.count);
        let mut leaving = self.poll();
        for (bit, routine) in self.routines() {
            self.a.memory(false, &[0xf6], 0, RSP, slot::LIVE); // test byte [live], bit
            self.a.bytes.push(bit);
            let live = self.a.jump_if(5);
            self.call_out(routine);
            self.refused.push((self.a.jump_if(2), rip));
            let here = self.a.here();
            self.a.land(live, here);
        }
        if self.source.counts_at_entry {
            self.add_count(count as i32);
            // More than may run.
            let enough = self.a.jump_if(3);
            self.add_count(-(count as i32));
            leaving.push(self.a.jump());
            let here = self.a.here();
            self.a.land(enough, here);
        }
        self.leaving.push((leaving, rip));
    }

    /// The routines that make vector state live, and what they are for.
    fn routines(&self) -> Vec<(u8, usize)> {
        let routines = self.stubs.vectors;
        let sse = self.need & (SSE | FULL) == SSE;
        [
            (SSE, routines.load_sse, sse),
            (FULL, routines.load_full, self.need & FULL != 0),
            (X87, routines.load_x87, self.need & X87 != 0),
        ]
        .into_iter()
        .filter_map(|(bit, routine, needed)| needed.then_some((bit, routine)))
        .collect()
    }

    /// After a handler: vector state is where Rust code found it. What comes next is the block's instruction `executed`,
    /// at `rip`.
    pub(super) fn revive(&mut self, rip: u64, executed: usize) {
        let missing = self.at.pending + executed as i32;
        for (_, routine) in self.routines() {
            self.call_out(routine);
            let good = self.a.jump_if(3);
            self.add_count(missing);
            self.refused.push((self.a.jump(), rip));
            let here = self.a.here();
            self.a.land(good, here);
        }
    }

    /// Compares the attention word with zero and the pages' states with the expected ones. The jumps are taken where there
    /// is something to look at.
    fn poll(&mut self) -> Vec<Jump> {
        self.a.load(SCRATCH, RSP, slot::ATTENTION);
        // cmp dword [r15], 0
        self.a.memory(false, &[0x83], 7, SCRATCH, 0);
        self.a.bytes.push(0);
        let mut found = vec![self.a.jump_if(5)];
        for &(state, address) in &self.source.states {
            self.compare_state(state, address);
            found.push(self.a.jump_if(5));
        }
        found
    }

    /// Compares a page's state with the expected one: `cmp dword [state], expected`.
    fn compare_state(&mut self, state: u32, address: u64) {
        const LENGTH: u64 = 10;
        let behind = self.address + self.a.here() as u64 + LENGTH;
        let distance = address.wrapping_sub(behind) as i64;
        match i32::try_from(distance) {
            Ok(distance) => {
                self.a.bytes.extend_from_slice(&[0x81, 0x3d]);
                self.a.bytes.extend_from_slice(&distance.to_le_bytes());
            }
            Err(_) => {
                self.a.mov_immediate(SCRATCH, address);
                self.a.memory(false, &[0x81], 7, SCRATCH, 0);
            }
        }
        self.states.push(self.a.here());
        self.a.bytes.extend_from_slice(&state.to_le_bytes());
    }

    /// `add qword [count], instructions`. Overwrites the host's flags.
    fn add_count(&mut self, instructions: i32) {
        if let Ok(short) = i8::try_from(instructions) {
            self.a.memory(true, &[0x83], 0, RSP, slot::COUNT);
            self.a.bytes.push(short as u8);
        } else {
            self.a.memory(true, &[0x81], 0, RSP, slot::COUNT);
            self.a.bytes.extend_from_slice(&instructions.to_le_bytes());
        }
    }

    /// Completes the count with the present block's instructions. The flags are in the frame, or a recipe.
    pub(super) fn count_now(&mut self) {
        let count = self.part().block.count as i32;
        if self.at.pending + count != 0 {
            self.lose_flags();
            self.add_count(self.at.pending + count);
        }
        self.at.pending = -count;
    }

    /// Goes on at a known RIP. `falls`: nothing of this part follows in the code.
    pub(super) fn edge(&mut self, rip: u64, falls: bool) {
        let Some(to) = self.region.target(self.present, rip) else {
            self.save_flags();
            self.count_now();
            return self.exit_to(rip);
        };
        if !self.region.parts[to].join {
            let at = self.leaving_part();
            self.incoming[to] = Some(at);
            if !(falls && to == self.present + 1) {
                let jump = self.a.jump();
                self.land_at(jump, to);
            }
            return;
        }
        self.save_flags_for(to);
        self.count_now();
        if to <= self.present {
            let leaving = self.poll();
            self.leaving.push((leaving, rip));
        }
        if !(falls && to == self.present + 1) {
            let jump = self.a.jump();
            self.land_at(jump, to);
        }
    }

    /// The state as the next block finds it where it follows this one alone.
    pub(super) fn leaving_part(&self) -> At {
        At { pending: self.at.pending + self.part().block.count as i32, ..self.at }
    }

    /// Makes a jump lead to a part.
    pub(super) fn land_at(&mut self, jump: Jump, part: usize) {
        match self.labels[part] {
            Some(label) => self.a.land(jump, label),
            None => self.waiting[part].push(jump),
        }
    }

    /// Leaves the region for a known RIP. Flags and count are in the frame.
    pub(super) fn exit_to(&mut self, rip: u64) {
        if (rip ^ self.region.parts[0].block.rip) >> 12 == 0 {
            self.exits.push((rip, self.a.here()));
            self.a.mov_immediate(ADDRESS, rip);
            return self.outward_jump(self.stubs.dispatch);
        }
        let (exit, ways) = self.a.jump_under_name();
        self.far.push((rip, exit, ways));
    }

    /// Goes to the block whose RIP is in [`ADDRESS`] after what `commit` does, which may not change the scratch registers.
    /// Where that block is not at hand, nothing is changed and the present instruction's handler is called, which also
    /// finds a RIP that is not canonical.
    pub(super) fn branch(&mut self, commit: impl FnOnce(&mut Assembler)) {
        let another = self.a.find_target(self.stubs.layout.targets);
        self.no_resume(another);
        commit(&mut self.a);
        self.a.jump_to_target();
    }

    /// Goes to the block whose RIP is in [`ADDRESS`]. Each place has its own jump, for the host to predict.
    pub(super) fn dispatch(&mut self) {
        let another = self.a.find_target(self.stubs.layout.targets);
        self.a.jump_to_target();
        self.outward.push((Assembler::at(another), self.stubs.leave));
    }

    pub(super) fn outward_jump(&mut self, to: usize) {
        let jump = self.a.jump();
        self.outward.push((Assembler::at(jump), to));
    }

    /// A conditional branch. Both ways inherit the flags.
    pub(super) fn conditional_jump(&mut self, i: &Instruction, condition: u8) {
        self.load_flags();
        let at = self.at;
        let rip = i.near_branch_target();
        match self.region.target(self.present, rip) {
            Some(to) if to == self.present + 1 && !self.region.parts[to].join => {
                // The next round of a loop.
                let not_taken = self.a.jump_if(condition ^ 1);
                self.inherit_or_defer(not_taken, i.next_ip(), at);
                return self.edge(rip, true);
            }
            Some(to) if to <= self.present && self.region.parts[to].join => {
                // Back: the way that is taken most often.
                let not_taken = self.a.jump_if(condition ^ 1);
                self.edge(rip, false);
                let here = self.a.here();
                self.a.land(not_taken, here);
                self.at = at;
            }
            _ => {
                let taken = self.a.jump_if(condition);
                self.inherit_or_defer(taken, rip, at);
            }
        }
        self.edge(i.next_ip(), true);
    }

    /// LOOP and JRCXZ, which leave the flags alone: so do the host's instructions.
    pub(super) fn branch_on_count(&mut self, i: &Instruction) {
        let (zero, other) = if i.mnemonic() != Mnemonic::Loop {
            (i.near_branch_target(), i.next_ip())
        } else {
            self.a.lea(self.wide(), RCX, Some(RCX), None, -1);
            // The flags do not follow from RCX any more.
            self.at.recipe = self.at.recipe.filter(|recipe| recipe.needs & 1 << 1 == 0);
            (i.next_ip(), i.near_branch_target())
        };
        let at = self.at;
        // jrcxz or jecxz over the jump to where the other way goes.
        self.a.bytes.extend_from_slice(if self.wide() { &[0xe3, 5] } else { &[0x67, 0xe3, 5] });
        let jump = self.a.jump();
        self.inherit_or_defer(jump, other, at);
        self.edge(zero, true);
    }

    /// A jump that is taken under a condition: to a part that inherits the present state, or to an edge of its own.
    fn inherit_or_defer(&mut self, jump: Jump, rip: u64, at: At) {
        match self.region.target(self.present, rip) {
            Some(to) if !self.region.parts[to].join => {
                self.incoming[to] = Some(self.leaving_part());
                self.land_at(jump, to);
            }
            _ => self.deferred.push((jump, rip, self.present, at)),
        }
    }

    /// What is seldom run, behind the code that is run often.
    pub(super) fn cold_paths(&mut self) {
        self.slow_copies();
        for cold in std::mem::take(&mut self.cold) {
            self.missed(cold.miss);
            self.cold_path(&cold);
        }
        for at in 0..self.far.len() {
            let (rip, _, ways) = self.far[at];
            let here = self.a.here();
            ways.into_iter().for_each(|jump| self.a.land(jump, here));
            let missing = self.a.jump_to_known_target(rip, self.stubs.layout.targets);
            self.outward.push((Assembler::at(missing), self.stubs.leave));
        }
        for (jumps, rip) in std::mem::take(&mut self.leaving) {
            self.leave_by(&jumps, rip, self.stubs.leave);
        }
        for (jump, rip) in std::mem::take(&mut self.refused) {
            self.leave_by(&[jump], rip, self.stubs.refuse);
        }
    }

    /// What a probe that found nothing leads to begins here; an operand on the stack is looked for again first.
    pub(super) fn missed(&mut self, miss: Miss) {
        let here = self.a.here();
        self.a.land(miss.from, here);
        if let Some(StackMiss { routine, found, displacement, wide }) = miss.stack {
            // Not from what it is beside the page that is known: that may have come to be known a moment ago.
            self.a.lea(wide, ADDRESS, Some(GUEST_RSP), None, displacement);
            self.call_out(routine);
            let again = self.a.jump_if(3);
            self.a.land(again, found);
        }
    }

    fn leave_by(&mut self, jumps: &[Jump], rip: u64, stub: usize) {
        let here = self.a.here();
        jumps.iter().for_each(|&jump| self.a.land(jump, here));
        self.a.mov_immediate(ADDRESS, rip);
        self.outward_jump(stub);
    }

    fn cold_path(&mut self, cold: &Cold) {
        if cold.counts != 0 {
            self.add_count(cold.counts);
        }
        match &cold.group {
            Some((access, registers)) => {
                let missing = self.one_by_one(*access, registers);
                let done = self.a.jump();
                if let Some(resume) = cold.resume {
                    self.a.land(done, resume);
                }
                // From the one that finds nothing on, all have their handlers called.
                for (insn, miss) in (cold.call.insn..).zip(missing) {
                    let here = self.a.here();
                    self.a.land(miss, here);
                    self.call_handler(Call { insn, ..cold.call });
                }
            }
            None => self.call_handler(cold.call),
        }
        let Some(resume) = cold.resume else { return };
        self.at = At { flags: Flags::Frame, recipe: None, pending: cold.call.pending, stale: false };
        self.revive(cold.next, cold.executed);
        if cold.load_flags {
            self.load_flags();
        }
        let back = self.a.jump();
        self.a.land(back, resume);
    }
}
