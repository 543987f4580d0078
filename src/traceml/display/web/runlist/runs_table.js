/* The table of runs. Its rows stay the same elements at each change, so that a click or a key meets the row it was
   meant for. Vue's templates escape every value; `v-html` must never be used here. */
export default {
  props: { columns: Array, rows: Array },
  emits: ["sort", "pick"],
  template: `
    <div class="scroll"><table>
      <thead><tr>
        <th scope="col" class="pickcell"><span class="visually-hidden">select</span></th>
        <th v-for="col in columns" :key="col.name" scope="col" :class="col.look" :aria-sort="col.order || 'none'">
          <button type="button" class="sort" @click="$emit('sort', col.name)">{{ col.label }}<span
            aria-hidden="true">{{ col.order === 'ascending' ? ' \u2191' : col.order ? ' \u2193' : '' }}</span></button>
        </th>
      </tr></thead>
      <tbody>
        <template v-for="row in rows" :key="row.id">
          <tr v-if="row.heading" class="groupline">
            <th :colspan="columns.length + 1" scope="colgroup">{{ row.heading }}</th>
          </tr>
          <tr :class="{ picked: row.picked }">
            <td class="pickcell"><input type="checkbox" :data-run="row.id" :checked="row.picked"
              :aria-label="'select ' + row.name" @change="$emit('pick', [row.id, $event.target.checked])"></td>
            <td v-for="col in columns" :key="col.name" :class="col.look">
              <template v-if="col.name === 'name'">
                <a class="name" :href="row.href">{{ row.name }}</a>
                <span class="id mono">{{ row.id }}</span>
                <span v-if="row.tags.length" class="tagline"><span v-for="tag in row.tags" :key="tag"
                  class="pill">{{ tag }}</span></span>
                <span v-if="row.note" class="id">{{ row.note }}</span>
              </template>
              <span v-else-if="row.looks[col.name] !== undefined && row.cells[col.name] !== '-'"
                :class="'pill ' + row.looks[col.name]">{{ row.cells[col.name] }}</span>
              <template v-else>{{ row.cells[col.name] }}</template>
            </td>
          </tr>
        </template>
      </tbody>
    </table></div>`,
};
