// The model as bytes (docs/protocol.md, section 1). Pure: no network here.

import { constants } from 'node:buffer';

import { Refusal } from './failures.js';
import type { DataType } from '../generated/modelaverage/v1/DataType.js';
import type { Fragment } from '../generated/modelaverage/v1/Fragment.js';
import type { Manifest__Output } from '../generated/modelaverage/v1/Manifest.js';

const ALIGNMENT_BYTES = 8;
const MAX_FRAGMENT_SIZE_BYTES = 2 * 1024 * 1024;
const ELEMENT_SIZE_BYTES: Partial<Record<DataType, number>> = {
  DATA_TYPE_FLOAT32: 4,
  DATA_TYPE_FLOAT64: 8,
  DATA_TYPE_FLOAT16: 2,
  DATA_TYPE_BFLOAT16: 2,
};

/** Where every variable lies in the flat buffer, and how that is cut into fragments. */
export class Layout {
  private readonly starts: number[] = [];
  private readonly sizeBytes: number = 0;
  readonly fragmentCount: number;

  /** `sizesBytes`: of each variable, in the order of the manifest. */
  constructor(private readonly sizesBytes: number[], private readonly fragmentSizeBytes: number) {
    let end = 0;
    for (const size of sizesBytes) {
      const start = Math.ceil(end / ALIGNMENT_BYTES) * ALIGNMENT_BYTES;
      this.starts.push(start);
      end = start + size;
      if (size > 0) this.sizeBytes = end;
    }
    if (this.sizeBytes > constants.MAX_LENGTH) {
      throw new Refusal(`the model has ${this.sizeBytes} bytes, a buffer of Node.js at most ${constants.MAX_LENGTH}`);
    }
    // Without a size nothing can be cut; a server refuses such a manifest.
    this.fragmentCount = fragmentSizeBytes > 0 ? Math.ceil(this.sizeBytes / fragmentSizeBytes) : 0;
  }

  /** The layout of a manifest from a server. Throws Refusal if this client cannot hold such a model. */
  static of(manifest: Manifest__Output): Layout {
    if (manifest.shard) {
      throw new Refusal(`the server keeps shard ${manifest.shard.index} of ${manifest.shard.count}, not a whole model`);
    }
    const cut = manifest.fragmentSizeBytes;
    if (cut < 1 || cut > MAX_FRAGMENT_SIZE_BYTES || cut % ALIGNMENT_BYTES !== 0) {
      throw new Refusal(`the manifest has fragments of ${cut} bytes`);
    }
    const sizesBytes = manifest.variables.map(({ name, dataType, shape }) => {
      const elementSize = ELEMENT_SIZE_BYTES[dataType];
      if (elementSize === undefined) throw new Refusal(`variable ${name} has the unknown data type ${dataType}`);
      return shape.reduce((product, extent) => product * Number(extent), elementSize);
    });
    return new Layout(sizesBytes, cut);
  }

  /** The flat buffer with these values, one buffer for each variable. */
  pack(values: Buffer[]): Buffer {
    if (values.length !== this.sizesBytes.length) {
      throw new Refusal(`the model has ${this.sizesBytes.length} variables, ${values.length} were given`);
    }
    const flat = Buffer.alloc(this.sizeBytes);
    values.forEach((value, i) => {
      if (value.length !== this.sizesBytes[i]) {
        throw new Refusal(`variable ${i} has ${this.sizesBytes[i]} bytes, ${value.length} were given`);
      }
      value.copy(flat, this.starts[i]);
    });
    return flat;
  }

  /** The variables' bytes: views into the flat buffer, not copies. */
  unpack(flat: Buffer): Buffer[] {
    return this.starts.map((start, i) => flat.subarray(start, start + this.sizesBytes[i]));
  }

  /** The fragments from `first` on, one after the other: views, too. */
  *fragments(flat: Buffer, first = 0): Generator<Fragment> {
    for (let index = first; index < this.fragmentCount; index++) {
      const start = index * this.fragmentSizeBytes;
      yield { index, data: flat.subarray(start, start + this.fragmentSizeBytes) };
    }
  }

  /** A center to put a server's fragments into. */
  assemble(): Assembly {
    return new Assembly(Buffer.alloc(this.sizeBytes), this.fragmentSizeBytes, this.fragmentCount);
  }
}

/** Takes the fragments of a stream, in their order, and gives the flat buffer once all have come. */
export class Assembly {
  private next = 0;

  constructor(
    private readonly flat: Buffer,
    private readonly fragmentSizeBytes: number,
    private readonly fragmentCount: number,
  ) {}

  add(index: number, data: Buffer): void {
    const start = this.next * this.fragmentSizeBytes;
    const size = Math.min(this.fragmentSizeBytes, this.flat.length - start);
    if (index !== this.next || data.length !== size) {
      const came = `fragment ${index} of ${data.length} bytes came`;
      throw new Refusal(`${came} where fragment ${this.next} of ${size} bytes belongs, of ${this.fragmentCount}`);
    }
    data.copy(this.flat, start);
    this.next++;
  }

  finish(): Buffer {
    if (this.next < this.fragmentCount) throw new Refusal(`${this.next} of ${this.fragmentCount} fragments came`);
    return this.flat;
  }
}
