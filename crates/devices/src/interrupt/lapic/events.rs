use engine::CpuEvent;

/// What the APIC has for its processor besides interrupts with vectors: INIT, SIPI and NMI.
///
/// ```text
///               INIT taken (application processors)
///   running  <------------------------------------->  waits for SIPI
///                          SIPI taken
/// ```
#[derive(Clone, Copy, Debug)]
pub(super) struct Events {
    bootstrap: bool,
    waits_for_sipi: bool,
    init: bool,
    sipi: Option<u8>,
    nmis: u8,
}

impl Events {
    pub fn new(bootstrap: bool) -> Self {
        Self { bootstrap, waits_for_sipi: !bootstrap, init: false, sipi: None, nmis: 0 }
    }

    /// One NMI may be in its handler and one more wait for that to end: what comes on top is lost.
    pub fn add_nmi(&mut self) {
        self.nmis = (self.nmis + 1).min(2);
    }

    pub fn add_init(&mut self) {
        self.init = true;
        self.sipi = None;
    }

    /// A SIPI means something to a processor that waits for one, or will once it has taken its INIT.
    pub fn add_sipi(&mut self, vector: u8) {
        if self.init && !self.bootstrap || self.waits_for_sipi {
            self.sipi = Some(vector);
        }
    }

    pub fn any(&self) -> bool {
        self.init || self.sipi.is_some() || self.nmis != 0
    }

    pub fn any_but_nmi(&self) -> bool {
        self.init || self.sipi.is_some()
    }

    /// Takes the next one.
    pub fn take(&mut self, nmi_allowed: bool) -> Option<CpuEvent> {
        if std::mem::take(&mut self.init) {
            self.waits_for_sipi = !self.bootstrap;
            self.nmis = 0;
            return Some(CpuEvent::Init);
        }
        if let Some(vector) = self.sipi.take() {
            self.waits_for_sipi = false;
            return Some(CpuEvent::Sipi(vector));
        }
        if !nmi_allowed || self.waits_for_sipi {
            // The processor is in an NMI's handler, or does not take any, so only one more can wait.
            self.nmis = self.nmis.min(1);
            return None;
        }
        self.nmis = self.nmis.checked_sub(1)?;
        Some(CpuEvent::Nmi)
    }
}
